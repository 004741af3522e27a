<?php
return [
    'default' => 'stderr',
    'channels' => ['stderr' => [
        'driver' => 'monolog',
        'level' => 'debug',
        'handler' => Monolog\Handler\StreamHandler::class,
        'with' => ['stream' => 'php://stderr'],
    ]],
];
