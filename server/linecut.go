package server

import (
	"bytes"
	"encoding/json"
)

// maxLogLine is the longest line kept whole, in bytes; a longer one is cut
// there and goes on as the next line. It bounds what one build can make the
// server hold for each of its waiters.
const maxLogLine = 4 << 20

// A lineCutter cuts a builder's output into lines as Nix does: a line ends at
// a newline, a carriage return goes back to the line's first column so that
// what follows overwrites what was there, and all other bytes pass.
//
// A line that begins with "@nix " and holds a JSON object with an action is
// addressed to Nix and never shown as it is: setPhase and msg are handed on,
// other actions are dropped, as Nix drops those of a builder. What is not such
// an object is a line like any other.
type lineCutter struct {
	line  func(line []byte) // line is only valid during the call
	phase func(name string)
	note  func(text string)

	buf []byte // the current line; buf[:pos] is before the cursor
	pos int
}

// Write takes the next bytes of the output. It never fails.
func (c *lineCutter) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		i := bytes.IndexAny(p, "\r\n")
		text := p
		if i >= 0 {
			text = p[:i]
		}
		c.put(text)
		if i < 0 {
			break
		}
		if p[i] == '\n' {
			c.emit()
		} else {
			c.pos = 0
		}
		p = p[i+1:]
	}
	return n, nil
}

// put writes text at the cursor.
func (c *lineCutter) put(text []byte) {
	for len(text) > 0 {
		room := maxLogLine - c.pos
		if room == 0 {
			c.emit()
			continue
		}
		part := text[:min(room, len(text))]
		over := copy(c.buf[c.pos:], part)
		c.buf = append(c.buf, part[over:]...)
		c.pos += len(part)
		text = text[len(part):]
	}
}

// Flush emits a last line that had no newline.
func (c *lineCutter) Flush() {
	if len(c.buf) > 0 {
		c.emit()
	}
}

func (c *lineCutter) emit() {
	line := c.buf
	c.buf, c.pos = c.buf[:0], 0
	if cap(c.buf) > 64<<10 {
		c.buf = nil // one long line must not cost memory for the rest of the build
	}
	if !c.command(line) {
		c.line(line)
	}
}

// infoLevel is the highest of Nix's verbosity levels that a client shows
// without being asked for more.
const infoLevel = 3

// command obeys a line addressed to Nix; it reports false for any other line.
func (c *lineCutter) command(line []byte) bool {
	text, ok := bytes.CutPrefix(line, []byte("@nix "))
	if !ok {
		return false
	}
	var msg struct {
		Action *string `json:"action"`
		Phase  *string `json:"phase"`
		Msg    *string `json:"msg"`
		Level  uint64  `json:"level"`
	}
	if err := json.Unmarshal(text, &msg); err != nil || msg.Action == nil {
		return false
	}
	switch *msg.Action {
	case "setPhase":
		if msg.Phase == nil {
			return false
		}
		c.phase(*msg.Phase)
	case "msg":
		if msg.Msg == nil {
			return false
		}
		if msg.Level <= infoLevel {
			c.note(*msg.Msg)
		}
	}
	return true
}
