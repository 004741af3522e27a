<?php // php -S 127.0.0.1:8000 docs/examples/wsoverhttp.php
// An API made for the Go program: its prefix, its port for pushes, JSON in and out.
$id = explode('/', $_SERVER['REQUEST_URI'])[2]; // /wsoverhttp/<ClientId>
$body = file_get_contents('php://input');

function push(string $to, array $message): bool {
    $header = "Content-Type: text/plain\r\nAuthorization: Bearer " . getenv('PUSH_TOKEN'); // new
    $options = ['method' => 'POST', 'header' => $header, 'content' => json_encode($message)];
    $context = stream_context_create(['http' => $options]);
    $port = getenv('PUSH') ?: 'localhost:7001';
    return @file_get_contents("http://$port/$to", false, $context) === 'ok';
}

if ($_SERVER['REQUEST_METHOD'] === 'POST') {
    [$kind, $number, $action, $payload] = json_decode($body, true) + [3 => null];
    $answer = $action === 'tell' ? push($payload['to'], [2, $number, 'told', $payload]) : $payload;
    echo json_encode([3, $number, $answer]);
} else { // GET: the client may connect; DELETE: it is gone
    echo 'ok';
}
