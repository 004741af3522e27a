<?php
$sqlite = ['driver' => 'sqlite', 'database' => dirname(__DIR__) . '/db.sqlite', 'prefix' => ''];
return [
    'default' => 'sqlite',
    'connections' => ['sqlite' => $sqlite],
    'migrations' => 'migrations',
];
