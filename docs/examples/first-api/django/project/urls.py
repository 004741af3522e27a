from chat.views import GatewayView
from django.contrib import admin
from django.urls import path

urlpatterns = [
    path("ws/<str:id>", GatewayView.as_view()),  # no slash at the end: the gateway sends none
    path("admin/", admin.site.urls),
]
