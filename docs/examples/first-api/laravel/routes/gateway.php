<?php

use App\Http\Controllers\GatewayController;
use Illuminate\Support\Facades\Route;

// Only the connect carries a cookie, so only it needs the session. The others stay outside of
// "web": there each message would meet the CSRF check, and start a session of its own.
Route::get('/ws/{id}', [GatewayController::class, 'connect'])->middleware('web');
Route::post('/ws/{id}', [GatewayController::class, 'message']);
Route::delete('/ws/{id}', [GatewayController::class, 'disconnect']);
