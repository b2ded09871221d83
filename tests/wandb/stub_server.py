"""A W&B server on loopback that the real client talks to; it keeps rows as the real one does, by file offset.

`StubServer` runs it in threads of the test. `mode` injects faults: ok, a status code such as 500, 401 or 429,
hang (never answers), drop (closes the connection). `can_rewind = False` refuses rewinding, as servers without
that feature do. It knows the GraphQL operations that wandb 0.31 sends; what it does with them is our reading of
the client, not W&B's documentation.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "team"
FILE_KINDS = {"wandb-history.jsonl": "history", "wandb-events.jsonl": "events", "output.log": "output"}


class StubServer:
    """A context manager; `url` is the base URL for the client."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.uploads: dict[str, int] = {}
        self.calls: list[str] = []
        self.mode = "ok"
        self.can_rewind = True
        self.released = threading.Event()
        self._lock = threading.Lock()
        handler = type("BoundHandler", (_Handler,), {"stub": self})
        self._http = _QuietServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> StubServer:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        """The history of a run in the order of its file."""
        with self._lock:
            history = next((run["history"] for name, run in self.runs.items() if name.endswith(f"/{run_id}")), {})
            return [history[offset] for offset in sorted(history)]

    def run(self, run_id: str) -> dict[str, Any]:
        return next(run for name, run in self.runs.items() if name.endswith(f"/{run_id}"))

    def graphql(self, operation: str, variables: dict[str, Any], host: str) -> dict[str, Any]:
        entity = variables.get("entity") or variables.get("entityName") or ENTITY
        project = variables.get("project") or "uncategorized"
        name = variables.get("name") or variables.get("runName") or variables.get("run")
        with self._lock:
            if operation == "Viewer":
                teams = {"edges": [{"node": {"name": ENTITY}}]}
                viewer = {"id": "user", "entity": ENTITY, "username": "u", "email": "u@x", "flags": "{}"}
                return {"viewer": {**viewer, "teams": teams}}
            if operation == "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            if operation == "OrgFeatureFlags":
                return {"organization": {"featureFlags": []}}
            if operation == "RunResumeStatus":
                bucket = self._bucket(entity, project, name) if f"{entity}/{project}/{name}" in self.runs else None
                owner = {"id": "entity", "name": entity}
                return {"model": {"id": "project", "name": project, "entity": owner, "bucket": bucket}}
            if operation == "UpsertBucket":
                return self._upsert(entity, project, name, variables)
            if operation == "RewindRun" and self.can_rewind:
                return self._rewind(entity, project, name, variables["metricValue"])
            if operation == "CreateRunFiles":
                files = [
                    {"name": file, "uploadUrl": f"http://{host}/upload/{entity}/{project}/{name}/{file}"}
                    for file in variables["files"]
                ]
                return {"createRunFiles": {"runID": name, "uploadHeaders": [], "files": files}}
            if operation == "MarkRunFilesUploaded":
                return {"markRunFilesUploaded": {"success": True}}
            if operation == "RunState":
                return {"project": {"run": {"id": "run", "state": "running"}}}
        raise LookupError(f"unsupported operation {operation}")

    def file_stream(self, path: str, posted: dict[str, Any]) -> None:
        match = re.fullmatch(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream", path)
        assert match is not None, path
        with self._lock:
            run = self._run(*match.groups())
            for file, content in (posted.get("files") or {}).items():
                for index, line in enumerate(content["content"]):
                    if file == "wandb-summary.json":
                        run["summary"] = json.loads(line)
                    elif file in FILE_KINDS:
                        value = line if file == "output.log" else json.loads(line)
                        run[FILE_KINDS[file]][content["offset"] + index] = value
            if posted.get("complete") is not None:
                run["complete"], run["exitcode"] = posted["complete"], posted.get("exitcode")

    def _run(self, entity: str, project: str, name: str) -> dict[str, Any]:
        empty: dict[str, Any] = {"config": {}, "history": {}, "events": {}, "output": {}, "summary": {}}
        empty |= {"tags": [], "complete": None, "exitcode": None, "rewinds": []}
        return self.runs.setdefault(f"{entity}/{project}/{name}", empty)

    def _upsert(self, entity: str, project: str, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        inserted = f"{entity}/{project}/{name}" not in self.runs
        run = self._run(entity, project, name)
        if variables.get("config"):
            run["config"] = json.loads(variables["config"])
        for key in ("displayName", "tags", "groupName", "notes"):
            if variables.get(key) is not None:
                run[key] = variables[key]
        return {"upsertBucket": {"bucket": self._bucket(entity, project, name), "inserted": inserted}}

    def _rewind(self, entity: str, project: str, name: str, step: int) -> dict[str, Any]:
        run = self._run(entity, project, name)
        run["rewinds"].append(step)
        run["history"] = {offset: row for offset, row in run["history"].items() if row["_step"] <= step}
        return {"rewindRun": {"rewoundRun": self._bucket(entity, project, name)}}

    def _bucket(self, entity: str, project: str, name: str) -> dict[str, Any]:
        run = self._run(entity, project, name)

        def tail(kind: str) -> str:
            lines = run[kind]
            return json.dumps([json.dumps(lines[offset]) for offset in sorted(lines)[-1:]])

        telemetry = (run["config"].get("_wandb") or {}).get("value", {}).get("t", 1)
        return {
            "id": base64.b64encode(f"Run:v1:{name}:{project}:{entity}".encode()).decode(),
            "name": name,
            "displayName": run.get("displayName") or name,
            "description": "",
            "notes": run.get("notes", ""),
            "config": json.dumps(run["config"]),
            "sweepName": None,
            "summaryMetrics": json.dumps(run["summary"]),
            "logLineCount": len(run["output"]),
            "historyLineCount": len(run["history"]),
            "eventsLineCount": len(run["events"]),
            "historyTail": tail("history"),
            "eventsTail": tail("events"),
            "tags": run["tags"],
            "wandbConfig": json.dumps({"t": telemetry}),
            "project": {"id": "project", "name": project, "entity": {"id": "entity", "name": entity}},
        }


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that give up or are killed are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: StubServer

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(404, {})

    def do_PUT(self) -> None:
        self.stub.uploads[self.path.removeprefix("/upload/")] = len(self._body())
        self._answer(200, {})

    def do_POST(self) -> None:
        body = self._body()
        posted = json.loads(body) if body.startswith(b"{") else {}
        is_graphql = self.path == "/graphql"
        operation = self.path
        if is_graphql:
            named = re.findall(r"(?:query|mutation)\s+(\w+)", posted.get("query", ""))
            operation = posted.get("operationName") or (named[0] if named else "?")
        self.stub.calls.append(f"{self.stub.mode} {operation}")
        if self.stub.mode == "hang":
            self.stub.released.wait()
        if self.stub.mode in ("hang", "drop"):
            self.close_connection = True
            self.connection.close()
        elif self.stub.mode.isdigit():
            self._answer(int(self.stub.mode), {"error": "injected"})
        elif is_graphql:
            try:
                data = self.stub.graphql(operation, posted.get("variables") or {}, self.headers["Host"])
                self._answer(200, {"data": data})
            except LookupError as error:
                self._answer(200, {"errors": [{"message": str(error)}], "data": None})
        elif self.path.endswith("/file_stream"):
            self.stub.file_stream(self.path, posted)
            self._answer(200, {"exitcode": None, "limits": {}})
        else:
            self._answer(404, {})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
