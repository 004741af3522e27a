<?php
return ['ws2api' => ['push' => env('WS2API_PUSH', 'http://127.0.0.1:7002'), 'token' => env('PUSH_TOKEN', '')]];
