"""The handler and the engine routes of both workers whose status servers are compared; the reference runs it with its own interpreter."""

import asyncio

CANARY = {"canary": True}


class Patient:
    """A handler that can fall sick, and the callbacks that make it."""

    def __init__(self, set_health):
        self._set_health = set_health
        self._mood = "well"

    async def generate(self, request):
        if self._mood == "hanging":
            await asyncio.sleep(30)
        elif self._mood == "raising":
            raise RuntimeError("engine down")
        yield "fine"

    async def mood(self, body):
        self._mood = body["mood"]
        return body

    async def health(self, body):
        self._set_health(body["ready"])
        return {}

    async def echo(self, body):
        return {"told": body}

    async def fail(self, body):
        raise ValueError("nope")

    def routes(self):
        """Names and callbacks."""
        return {"mood": self.mood, "health": self.health, "control/echo": self.echo, "fail": self.fail}
