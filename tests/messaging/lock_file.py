"""A program that holds the write lock of a SQLite file until a line comes in.

python lock_file.py PATH
"""

import sys

import apsw

if __name__ == "__main__":
    connection = apsw.Connection(sys.argv[1])
    connection.set_busy_timeout(5_000)
    connection.execute("BEGIN IMMEDIATE")
    print("ready", flush=True)
    sys.stdin.readline()
    connection.execute("ROLLBACK")
    connection.close()
