# gunicorn -c gunicorn.conf.py project.wsgi
bind = "127.0.0.1:8000"
workers = 2
worker_class = "gthread"  # the default, sync, closes the connection after each request
threads = 16
worker_connections = 1000  # more than the gateway's --api-max-connections for each worker
keepalive = 75  # the default is 2 s
backlog = 2048
