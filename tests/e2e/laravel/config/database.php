<?php
return [
    'default' => 'sqlite',
    'connections' => ['sqlite' => ['driver' => 'sqlite', 'database' => dirname(__DIR__) . '/db.sqlite', 'prefix' => '']],
    'migrations' => 'migrations',
];
