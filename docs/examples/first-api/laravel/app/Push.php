<?php

namespace App;

use Illuminate\Http\Client\ConnectionException;
use Illuminate\Support\Facades\DB;
use Illuminate\Support\Facades\Http;

class Push
{
    /**
     * Send a message to a client: from a controller, a job, a listener, or tinker.
     *
     * The push port finds the worker that has the client. When the port is not reachable or says
     * 503, because Redis is away, ask that worker itself.
     */
    public function send(string $to, string $text): bool
    {
        $status = $this->post(config('services.ws2api.push') . "/$to", $text);
        if ($status === 0 || $status === 503) {
            $url = DB::table('clients')->where('id', $to)->value('push_url');
            $status = $url ? $this->post($url, $text) : $status;
        }
        return $status === 200;
    }

    private function post(string $url, string $text): int
    {
        try {
            return Http::timeout(10)->withToken(config('services.ws2api.token'))
                ->withBody($text, 'text/plain; charset=utf-8')->post($url)->status();
        } catch (ConnectionException) {
            return 0;
        }
    }
}
