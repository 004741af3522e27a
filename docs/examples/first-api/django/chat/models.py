from django.db import models


class Client(models.Model):
    """A connected client, and the last message that came from it."""

    id = models.CharField(max_length=255, primary_key=True)
    generation = models.BigIntegerField()
    push_url = models.URLField(max_length=500)
    sequence = models.BigIntegerField(default=0)
    answer = models.TextField(default="")
