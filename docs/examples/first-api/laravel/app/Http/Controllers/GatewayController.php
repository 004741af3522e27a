<?php

namespace App\Http\Controllers;

use App\Push;
use Illuminate\Http\Request;
use Illuminate\Routing\Controller;
use Illuminate\Support\Facades\DB;
use Illuminate\Support\Facades\Log;

class GatewayController extends Controller
{
    /** A client wants to connect: say ok, or no. */
    public function connect(Request $request, string $id)
    {
        // Not the middleware "auth": it would redirect, and the client get 502.
        $user = $request->user();
        if ($user?->name !== $id) {
            return $this->text('log in first', $user ? 403 : 401);
        }
        DB::table('clients')->updateOrInsert(['id' => $id], [
            'generation' => $request->header('Ws2api-Generation'),
            'push_url' => $request->header('Ws2api-Push-Url'),
            'sequence' => 0,
        ]);
        return $this->text('ok')->header('Ws2api-Retry', 'safe'); // message() notices repeats
    }

    /** A client has sent a message: what is answered goes back to it. */
    public function message(Request $request, Push $push, string $id)
    {
        $client = DB::table('clients')->where('id', $id)
            ->where('generation', $request->header('Ws2api-Generation'));
        $sequence = (int) $request->header('Ws2api-Sequence');
        $seen = (clone $client)->where('sequence', $sequence)->first();
        if ($seen) { // the message came before, and the answer was lost on its way
            return $this->text($seen->answer);
        }
        $text = $request->getContent();
        $answer = "you said: $text";
        if (preg_match('/^@([a-z]+) (.*)/s', $text, $to)) { // "@bob hello" is for another client
            $answer = $push->send($to[1], "$id: $to[2]") ? 'delivered' : "$to[1] is not here";
        }
        $client->update(['sequence' => $sequence, 'answer' => $answer]);
        return $this->text($answer);
    }

    /** A client is gone. If it has connected again, the row has a newer generation and stays. */
    public function disconnect(Request $request, string $id)
    {
        DB::table('clients')->where('id', $id)
            ->where('generation', $request->header('Ws2api-Generation'))->delete();
        Log::info("$id left: {$request->getContent()}");
        return response()->noContent();
    }

    private function text(string $body, int $status = 200)
    {
        return response($body, $status)->header('Content-Type', 'text/plain; charset=utf-8');
    }
}
