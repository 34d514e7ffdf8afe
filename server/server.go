// Package server speaks to Nix clients over SSH and decides what happens.
//
// A client is a key, which belongs to an account of the store (auth.go). On
// its connection (ssh.go) it opens sessions, each of which runs one exec
// command: the worker protocol (conn.go, ops.go, transfer.go) or the serve
// protocol (serve.go). A Session is what the rest of the server knows of it.
//
//	listener ── limits ── handshake ── key → account     ssh.go, auth.go
//	   └── session channel ── env, exec                  channel.go, command.go
//	         ├── nix-daemon --stdio ── operation loop    conn.go, ops.go
//	         │     └── paths in and out                  transfer.go
//	         └── nix-store --serve  ── command loop      serve.go
//	               └── Builder: builds                   builder.go (interface)
//
// What holds throughout:
//
//   - Everything a client can ask about or change is its account's own view of
//     the store; "not there" and "not yours" are the same answer.
//   - What was reported valid or uploaded in a session is leased until the
//     session ends.
//   - A message to a client is written whole. Nothing that a client does or
//     omits delays another client or a build: what a session reads and writes
//     blocks that session alone.
//   - After an error a session either has read the whole failed request or is
//     closed.
//   - Every goroutine belongs to the Server and ends before Close returns.
package server
