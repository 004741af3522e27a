// SECRET=something-long node server.mjs
import cookieSession from "cookie-session";
import express from "express";

const token = process.env.PUSH_TOKEN ?? ""; // the gateway's --push-token, if it has one
const clients = new Map(); // id -> what is known of the client's connection; see "In production"

async function post(url, text) {
  try {
    const headers = { "Content-Type": "text/plain; charset=utf-8", Authorization: `Bearer ${token}` };
    return (await fetch(url, { method: "POST", body: text, headers })).status;
  } catch {
    return 0;
  }
}

// Send a message to a client, at any time. The push port finds the worker that has the client.
// When the port is not reachable or says 503, because Redis is away, ask that worker itself.
export async function push(to, text) {
  let status = await post(`http://${process.env.PUSH ?? "127.0.0.1:7002"}/${to}`, text);
  const client = clients.get(to);
  if (client && (status === 0 || status === 503)) {
    status = await post(client.pushUrl, text);
  }
  return status === 200;
}

const textOf = ({ body }) => (body?.length ? String(body) : ""); // no body leaves no string

async function answer(id, text) {
  const to = text.match(/^@([a-z]+) (.*)/s); // "@bob hello" is for another client
  if (!to) return `you said: ${text}`;
  return (await push(to[1], `${id}: ${to[2]}`)) ? "delivered" : `${to[1]} is not here`;
}

const session = cookieSession({ name: "session", secret: process.env.SECRET });

const gateway = express.Router();
gateway.use(express.text({ type: "text/plain", limit: "1mb" }));
gateway.use(express.raw({ type: "application/octet-stream", limit: "1mb" }));

// A client wants to connect: say ok, or no.
gateway.get("/:id", session, (request, response) => {
  const { id } = request.params;
  if (request.session.user !== id) {
    return response.status(request.session.user ? 403 : 401).send("log in first");
  }
  const generation = request.get("Ws2api-Generation");
  const pushUrl = request.get("Ws2api-Push-Url");
  clients.set(id, { generation, pushUrl, sequence: "0", answer: "" });
  response.set("Ws2api-Retry", "safe").send("ok"); // the POST notices what it has seen
});

// A client has sent a message: what is sent here goes back to it.
gateway.post("/:id", async (request, response) => {
  const { id } = request.params;
  const [generation, sequence] = [request.get("Ws2api-Generation"), request.get("Ws2api-Sequence")];
  let client = clients.get(id);
  if (client?.generation !== generation) client = {}; // a newer connection has the entry
  if (client.sequence !== sequence) {
    client.sequence = sequence;
    client.answer = answer(id, textOf(request)); // a promise, also for a second request
  }
  response.type("text/plain").send(await client.answer);
});

// A client is gone. If it has connected again meanwhile, the entry has a newer generation.
gateway.delete("/:id", (request, response) => {
  const { id } = request.params;
  if (clients.get(id)?.generation === request.get("Ws2api-Generation")) clients.delete(id);
  console.log(`${id} left: ${textOf(request)}`);
  response.sendStatus(204);
});

// A stand-in for your own application and its login.
const users = { ann: "secret-of-ann", bob: "secret-of-bob" };
const site = express.Router();
site.use(express.urlencoded(), session);
site.get("/", (request, response) => {
  response.send(`<form method="post" action="/login"><input name="user" placeholder="user">
    <input name="password" type="password" placeholder="password"><button>log in</button></form>`);
});
site.post("/login", (request, response) => {
  const { user, password } = request.body ?? {};
  if (Object.hasOwn(users, user) && users[user] === password) request.session.user = user;
  response.type("text/plain").send(`you are ${request.session.user ?? "nobody"}`);
});

const server = express()
  .disable("etag")
  .use("/ws", gateway) // before anything else that reads bodies or starts sessions
  .use(site)
  .listen(process.env.PORT ?? 8000, "127.0.0.1");
server.keepAliveTimeout = 75_000; // Node's own are 5 s; the gateway keeps its connections
