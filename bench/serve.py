"""The process behind a remote.Server."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from .cases import Case
from .remote import Refused


def serve() -> None:
    """Answers the requests of a Server until it closes stdin."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply

    def reply(**message: Any) -> None:
        print(json.dumps(message), file=replies, flush=True)

    try:
        import torch

        from .device import isa
        from .measure import keep_freed_memory, mm_timer
        from .run import MM, Entry, prepare
    except Exception as error:
        reply(error=f"{type(error).__name__}: {error}")
        return
    keep_freed_memory()
    reply(ready=True)
    entries: list[Entry] = []
    for line in sys.stdin:
        request = json.loads(line)
        if "number" in request:
            reply(seconds=entries[request["entry"]].timer.seconds(request["number"]))
            continue
        if "cold" in request:
            reply(seconds=entries[request["entry"]].timer.cold(request["cold"]))
            continue
        if "forget" in request:
            entries.clear()
            reply(forgotten=True)
            continue
        torch.set_num_threads(request["threads"])
        device = request["device"]
        try:
            if request["name"] == MM:
                entry = Entry(mm_timer(device, threads=request["threads"]), isa(device), "")
            else:
                entry = prepare(request["name"], Case(**request["case"]), device)
        except Refused as refused:
            reply(refused=str(refused))
        except Exception as error:  # the interface of another commit may be another
            reply(refused=f"{type(error).__name__}: {error}")
        else:
            entries.append(entry)
            about = {"isa": entry.isa, "version": entry.version, "extra_bytes": entry.extra_bytes}
            reply(entry=len(entries) - 1, **about)
