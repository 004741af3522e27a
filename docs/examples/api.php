<?php // php -S 127.0.0.1:8000 docs/examples/api.php
$id = substr(parse_url($_SERVER['REQUEST_URI'], PHP_URL_PATH), 1);
$body = file_get_contents('php://input');

function push(string $to, string $text): bool {
    $port = getenv('PUSH') ?: '127.0.0.1:7002';
    $header = "Content-Type: text/plain\r\nAuthorization: Bearer " . getenv('PUSH_TOKEN');
    $context = stream_context_create(['http' => [
        'method' => 'POST', 'header' => $header, 'content' => $text]]);
    return @file_get_contents("http://$port/$to", false, $context) === 'ok';
}

if ($_SERVER['REQUEST_METHOD'] == 'GET') { // a client connects: ok lets it in
    echo preg_match('/^[a-z]+$/', $id) ? 'ok' : 'an id has letters a to z';
} elseif ($_SERVER['REQUEST_METHOD'] == 'DELETE') { // a client has left: the body says why
    error_log("$id left: $body");
} elseif (preg_match('/^@([a-z]+) (.*)/s', $body, $to)) { // "@bob hello" is for another client
    echo push($to[1], "$id: $to[2]") ? 'delivered' : "$to[1] is not here";
} else { // any other message: the answer goes back to the one who sent it
    echo "you said: $body";
}
