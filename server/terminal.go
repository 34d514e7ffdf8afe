package server

import (
	"sync"

	gossh "golang.org/x/crypto/ssh"
)

// A terminalSize is the size of a client's terminal, of which it may tell at
// any time.
type terminalSize struct {
	mu            sync.Mutex // guards what follows
	width, height int        // in characters; 0 without a terminal
	resized       func(width, height int)
}

// maxTerminal bounds the width and height of a terminal.
const maxTerminal = 4096

// granted reads a request for a terminal (RFC 4254, 6.2). Its modes do not
// matter: there is none but that of our own line editing.
func (t *terminalSize) granted(payload []byte) bool {
	var req struct {
		Term                   string
		Columns, Rows          uint32
		PixelWidth, PixelHeght uint32
		Modes                  string
	}
	if gossh.Unmarshal(payload, &req) != nil {
		return false
	}
	t.set(req.Columns, req.Rows)
	return true
}

// changed reads the new size of a terminal (RFC 4254, 6.7).
func (t *terminalSize) changed(payload []byte) bool {
	var req struct{ Columns, Rows, PixelWidth, PixelHeight uint32 }
	if !t.is() || gossh.Unmarshal(payload, &req) != nil {
		return false
	}
	t.set(req.Columns, req.Rows)
	return true
}

// set notes a size; one that is not known is taken for the usual one.
func (t *terminalSize) set(columns, rows uint32) {
	bound := func(n uint32, usual int) int {
		if n == 0 || n > maxTerminal {
			return usual
		}
		return int(n)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.width, t.height = bound(columns, 80), bound(rows, 24)
	if t.resized != nil {
		t.resized(t.width, t.height)
	}
}

// is reports whether there is a terminal.
func (t *terminalSize) is() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.width > 0
}

// isTerminal reports whether the client shows a terminal what it is sent.
func (ss *session) isTerminal() bool { return ss.term.is() }
