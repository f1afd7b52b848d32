"""The same job, written in the usual way: FastAPI, uvicorn, a SQLite transaction a request.

A request inserts the rating and updates count and sum in one transaction, with WAL and
``synchronous=FULL``: what it answers survives what Molva's answers survive. The endpoint is
a plain function, which FastAPI runs in its thread pool, as its documentation recommends
for blocking work; each thread keeps its own connection.
"""

import sqlite3
import sys
import threading
import uuid

import uvicorn
from fastapi import FastAPI, HTTPException

app = FastAPI()
local = threading.local()
PATH = sys.argv[2] if len(sys.argv) > 2 else ":memory:"


def connection() -> sqlite3.Connection:
    found: sqlite3.Connection | None = getattr(local, "connection", None)
    if found is None:
        found = local.connection = sqlite3.connect(PATH, timeout=30, isolation_level=None)
        found.execute("PRAGMA journal_mode = WAL")
        found.execute("PRAGMA synchronous = FULL")
        found.executescript(
            """
            CREATE TABLE IF NOT EXISTS rating (id BLOB PRIMARY KEY, rate INTEGER) WITHOUT ROWID;
            CREATE TABLE IF NOT EXISTS total (k INTEGER PRIMARY KEY, n INTEGER, sum INTEGER);
            INSERT OR IGNORE INTO total VALUES (1, 0, 0);
            """
        )
    return found


@app.post("/rate", status_code=202)
def rate(rate: int) -> dict[str, str]:
    if not 0 <= rate <= 10:
        raise HTTPException(400)
    id_ = uuid.uuid4()
    database = connection()
    database.execute("BEGIN IMMEDIATE")
    try:
        database.execute("INSERT INTO rating VALUES (?, ?)", (id_.bytes, rate))
        database.execute("UPDATE total SET n = n + 1, sum = sum + ? WHERE k = 1", (rate,))
        database.execute("COMMIT")
    except BaseException:
        database.execute("ROLLBACK")
        raise
    return {"id": str(id_)}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False)
