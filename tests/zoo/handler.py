"""Does what the `handler` section of its model-config.yaml says, on load and on every request."""

import os
import signal
import time


class ZooHandler:
    """load, predict: one of the names below. seconds: how long "slow" takes. ballast_mib: memory that it holds."""

    def initialize(self, context):
        self.config = context.model_yaml_config["handler"]
        self.ballast = bytearray(os.urandom(1)) * (self.config.get("ballast_mib", 0) << 20)
        self.act(self.config.get("load", "nothing"))

    def handle(self, data, context):
        body = data[0].get("body", b"")
        action = self.config.get("predict", "echo")
        if action == "refuse":
            context.set_response_status(code=400, idx=0)
            context.set_response_content_type(0, "application/json")
            return [b'{"error": {"code": "bad_request", "message": "refused", "field": "image"}}']
        self.act(action)
        context.set_response_content_type(0, "application/octet-stream")
        size = self.config.get("reply_bytes")
        return [bytes(body) if size is None else bytes(size)]

    def act(self, action):
        if action == "fail":
            raise RuntimeError("a failure with a secret in it")
        if action == "fail oddly":
            raise KeyError("odd")
        if action == "memory error":
            raise MemoryError
        if action == "hang":
            time.sleep(3600)
        if action == "exit":
            os._exit(3)
        if action == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "slow":
            time.sleep(self.config["seconds"])
