# A handler as it ran behind API Gateway. Only the import is new: it was "import boto3".
import json

import boto_shim as boto3


def handler(event, context):
    route = event["requestContext"]["routeKey"]
    id = event["requestContext"]["connectionId"]
    if route == "$connect":
        allowed = (event.get("queryStringParameters") or {}).get("token") == "secret"
        return {"statusCode": 200 if allowed else 401}
    if route == "$disconnect":
        print(f"{id} left with {event['requestContext']['disconnectStatusCode']}")
        return {"statusCode": 200}
    if route == "send":
        message = json.loads(event["body"])
        connections = boto3.client("apigatewaymanagementapi", endpoint_url="…")
        try:
            connections.post_to_connection(ConnectionId=message["to"], Data=message["text"])
        except connections.exceptions.GoneException:
            return {"statusCode": 200, "body": f"{message['to']} is gone"}
        return {"statusCode": 200}
    return {"statusCode": 200, "body": f"you said: {event['body']}"}
