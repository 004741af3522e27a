<?php
// What may stand in your application already: a database, and users who log in.
$users = ['ann' => 'secret-of-ann', 'bob' => 'secret-of-bob'];
$db = new PDO(getenv('DATABASE') ?: 'sqlite:first-api.sqlite');
$db->exec('CREATE TABLE IF NOT EXISTS clients (id VARCHAR(255) PRIMARY KEY,
    generation BIGINT, push_url TEXT, sequence BIGINT, answer TEXT)');

function query(string $sql, ...$values): PDOStatement {
    $statement = $GLOBALS['db']->prepare($sql);
    $statement->execute($values);
    return $statement;
}

function post(string $url, string $text): int {
    $header = "Content-Type: text/plain; charset=utf-8\r\nConnection: close\r\nAuthorization: Bearer ";
    $options = ['method' => 'POST', 'content' => $text, 'timeout' => 10, 'ignore_errors' => true,
        'header' => $header . getenv('PUSH_TOKEN')]; // the gateway's --push-token, if it has one
    $answer = @file_get_contents($url, false, stream_context_create(['http' => $options]));
    return $answer === false ? 0 : (int) explode(' ', $http_response_header[0])[1];
}

// Send a message to a client, from any script. The push port finds the worker that has the client.
// When the port is not reachable or says 503, because Redis is away, ask that worker itself.
function push(string $to, string $text): bool {
    $status = post('http://' . (getenv('PUSH') ?: '127.0.0.1:7002') . "/$to", $text);
    if ($status === 0 || $status === 503) {
        $url = query('SELECT push_url FROM clients WHERE id = ?', $to)->fetchColumn();
        $status = $url ? post($url, $text) : $status;
    }
    return $status === 200;
}

// A client wants to connect: say ok, or no.
function connect(string $id): string {
    session_start(['read_and_close' => true]); // or the session stays locked for other requests
    if (($_SESSION['user'] ?? null) !== $id) {
        http_response_code(isset($_SESSION['user']) ? 403 : 401);
        return 'log in first';
    }
    header('Ws2api-Retry: safe'); // message() notices a message that it has seen
    query('REPLACE INTO clients VALUES (?, ?, ?, 0, NULL)',
        $id, (int) $_SERVER['HTTP_WS2API_GENERATION'], $_SERVER['HTTP_WS2API_PUSH_URL']);
    return 'ok';
}

// A client has sent a message: what is returned goes back to it.
function message(string $id, string $text): string {
    $key = [$id, (int) $_SERVER['HTTP_WS2API_GENERATION'], (int) $_SERVER['HTTP_WS2API_SEQUENCE']];
    $seen = query('SELECT answer FROM clients WHERE id = ? AND generation = ? AND sequence = ?',
        ...$key)->fetchColumn();
    if (is_string($seen)) { // the message came before, and the answer was lost on its way
        return $seen;
    }
    $answer = "you said: $text";
    if (preg_match('/^@([a-z]+) (.*)/s', $text, $to)) { // "@bob hello" is for another client
        $answer = push($to[1], "$id: $to[2]") ? 'delivered' : "$to[1] is not here";
    }
    query('UPDATE clients SET sequence = ?, answer = ? WHERE id = ? AND generation = ?',
        $key[2], $answer, $id, $key[1]);
    return $answer;
}

// A client is gone. If it has connected again meanwhile, the row has a newer generation and stays.
function disconnect(string $id, string $reason): string {
    $generation = (int) $_SERVER['HTTP_WS2API_GENERATION'];
    query('DELETE FROM clients WHERE id = ? AND generation = ?', $id, $generation);
    error_log("$id left: $reason");
    return '';
}

$path = strtok($_SERVER['REQUEST_URI'], '?');
if (preg_match('~^/ws/([^/]+)$~', $path, $found)) { // from the gateway
    header('Content-Type: text/plain; charset=utf-8');
    $body = file_get_contents('php://input');
    echo match ($_SERVER['REQUEST_METHOD']) {
        'GET' => connect($found[1]),
        'POST' => message($found[1], $body),
        'DELETE' => disconnect($found[1], $body),
    };
} elseif ($path === '/login') { // a stand-in for your own login
    session_start();
    if (($users[$_POST['user'] ?? ''] ?? null) === ($_POST['password'] ?? '')) {
        session_regenerate_id();
        $_SESSION['user'] = $_POST['user'];
    }
    echo 'you are ', htmlspecialchars($_SESSION['user'] ?? 'nobody');
} else {
    echo '<form method="post" action="/login"><input name="user" placeholder="user">
        <input name="password" type="password" placeholder="password">
        <button>log in</button></form>';
}
