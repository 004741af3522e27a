<?php
// Be as much of a Laravel project as the example needs: Debian's framework, a login, a database.
require_once '/usr/share/php/Illuminate/autoload.php';
require_once '/usr/share/php/GuzzleHttp/autoload.php';

spl_autoload_register(function (string $class) {
    $file = __DIR__ . '/' . lcfirst(strtr($class, '\\', '/')) . '.php';
    if (is_file($file)) {
        require $file;
    }
});

class HttpKernel extends Illuminate\Foundation\Http\Kernel
{
    protected $middleware = [
        Illuminate\Foundation\Http\Middleware\PreventRequestsDuringMaintenance::class,
    ];
    protected $middlewareGroups = ['web' => [
        Illuminate\Cookie\Middleware\EncryptCookies::class,
        Illuminate\Cookie\Middleware\AddQueuedCookiesToResponse::class,
        Illuminate\Session\Middleware\StartSession::class,
        Illuminate\Foundation\Http\Middleware\VerifyCsrfToken::class,
    ]];
}

$app = new Illuminate\Foundation\Application(__DIR__);
foreach ([
    Illuminate\Contracts\Http\Kernel::class => HttpKernel::class,
    Illuminate\Contracts\Console\Kernel::class => Illuminate\Foundation\Console\Kernel::class,
    Illuminate\Contracts\Debug\ExceptionHandler::class =>
        Illuminate\Foundation\Exceptions\Handler::class,
] as $contract => $class) {
    $app->singleton($contract, $class);
}
$app->booted(function ($app) {
    require __DIR__ . '/routes/gateway.php';
    require __DIR__ . '/routes/login.php';
});
return $app;
