package server

import (
	"bytes"
	"fmt"
	"io"
	"unicode/utf8"
)

// A cleanWriter passes text on to what may be a terminal: line ends and tabs as
// they are, all else that could control the terminal in a form that can be
// read, such as \x1b. It may let sequences through that set colours.
type cleanWriter struct {
	w       io.Writer
	colours bool
	pending []byte // the beginning of a character or sequence
	set     bool   // a colour may be set
	out     bytes.Buffer
}

func newCleanWriter(w io.Writer, colours bool) *cleanWriter {
	return &cleanWriter{w: w, colours: colours}
}

// maxSGR is the longest sequence that sets colours, in bytes.
const maxSGR = 64

// Write implements io.Writer.
func (c *cleanWriter) Write(p []byte) (int, error) {
	b := p
	if len(c.pending) > 0 {
		b = append(c.pending, p...)
		c.pending = nil
	}
	for len(b) > 0 {
		n := c.next(b)
		if n == 0 { // incomplete
			c.pending = bytes.Clone(b)
			break
		}
		b = b[n:]
	}
	_, err := c.out.WriteTo(c.w)
	return len(p), err
}

// Close writes what is pending, and sets the colours back.
func (c *cleanWriter) Close() error {
	for _, b := range c.pending {
		if b >= utf8.RuneSelf || isControl(rune(b)) {
			c.escape(b)
		} else {
			c.out.WriteByte(b)
		}
	}
	c.pending = nil
	if c.set {
		c.out.WriteString("\x1b[0m")
	}
	_, err := c.out.WriteTo(c.w)
	return err
}

func (c *cleanWriter) escape(b byte) { fmt.Fprintf(&c.out, `\x%02x`, b) }

// next takes one character or sequence from the beginning of b and returns its
// length, 0 if more of it has to come.
func (c *cleanWriter) next(b []byte) int {
	switch b[0] {
	case '\n', '\t':
		c.out.WriteByte(b[0])
		return 1
	case '\r':
		if len(b) == 1 {
			return 0
		}
		if b[1] != '\n' {
			c.out.WriteString(`\r`)
		}
		return 1
	case 0x1b:
		if c.colours {
			return c.sequence(b)
		}
	}
	if !utf8.FullRune(b) {
		return 0
	}
	r, n := utf8.DecodeRune(b)
	switch {
	case r == utf8.RuneError && n == 1, r < 0x80 && isControl(r):
		c.escape(b[0])
	case isControl(r):
		fmt.Fprintf(&c.out, `\u%04x`, r)
	default:
		c.out.Write(b[:n])
	}
	return n
}

// sequence takes an escape sequence, if it is one that sets colours.
func (c *cleanWriter) sequence(b []byte) int {
	for i := 1; i < len(b) && i < maxSGR; i++ {
		switch ch := b[i]; {
		case i == 1 && ch == '[', i > 1 && (ch >= '0' && ch <= '9' || ch == ';' || ch == ':'):
			continue
		case i > 1 && ch == 'm':
			c.set = true
			c.out.Write(b[:i+1])
			return i + 1
		}
		c.escape(b[0])
		return 1
	}
	if len(b) < maxSGR {
		return 0
	}
	c.escape(b[0])
	return 1
}

// A crlfWriter ends lines as a terminal in raw mode needs it.
type crlfWriter struct{ w io.Writer }

// Write implements io.Writer.
func (c crlfWriter) Write(p []byte) (int, error) {
	if _, err := c.w.Write(bytes.ReplaceAll(p, []byte("\n"), []byte("\r\n"))); err != nil {
		return 0, err
	}
	return len(p), nil
}
