"""A reward service: python examples/reward_service.py, then task.verifier=http://127.0.0.1:9000/rewards"""

import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = os.environ.get("REWARD_KEY")  # with task.verifier_api_key_env=REWARD_KEY


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if KEY and self.headers["Authorization"] != f"Bearer {KEY}":
            return self.send_error(401)
        pairs = zip(body["responses"], body["answers"], strict=True)
        reply = json.dumps({"rewards": [float(answer in response) for response, answer in pairs]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("PORT", "9000"))), Handler).serve_forever()
