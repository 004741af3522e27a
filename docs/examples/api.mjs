// node docs/examples/api.mjs
import { createServer } from "node:http";

async function push(to, text) {
  const port = process.env.PUSH ?? "127.0.0.1:7002";
  const headers = { Authorization: `Bearer ${process.env.PUSH_TOKEN ?? ""}` };
  return (await fetch(`http://${port}/${to}`, { method: "POST", body: text, headers })).ok;
}

createServer(async (request, response) => {
  const id = request.url.split("?")[0].slice(1);
  const body = (await request.setEncoding("utf8").toArray()).join("");
  const to = body.match(/^@([a-z]+) (.*)/s);
  let answer = `you said: ${body}`; // goes back to the one who sent the message
  if (request.method === "GET") { // a client connects: ok lets it in
    answer = /^[a-z]+$/.test(id) ? "ok" : "an id has letters a to z";
  } else if (request.method === "DELETE") { // a client has left: the body says why
    console.log(`${id} left: ${body}`);
  } else if (to) { // "@bob hello" is for another client
    answer = (await push(to[1], `${id}: ${to[2]}`)) ? "delivered" : `${to[1]} is not here`;
  }
  response.end(answer);
}).listen(process.env.PORT ?? 8000, "127.0.0.1");
