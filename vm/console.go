package vm

import (
	"bytes"
	"regexp"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"
)

// consoleTail is how much of a guest's console is kept.
const consoleTail = 16 << 10

// A console keeps the last bytes of what QEMU and the guest's kernel print, for
// reports of errors. A guest may print without bound. It implements io.Writer
// and is safe for concurrent use.
type console struct {
	mu   sync.Mutex
	tail []byte
}

// Write never fails.
func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := len(p)
	if n > consoleTail {
		p = p[n-consoleTail:]
	}
	if over := len(c.tail) + len(p) - consoleTail; over > 0 {
		c.tail = append(c.tail[:0], c.tail[over:]...)
	}
	c.tail = append(c.tail, p...)
	return n, nil
}

// lines returns at most the n last lines that are not empty, fit to be printed
// on a terminal.
func (c *console) lines(n int) []string {
	c.mu.Lock()
	text := bytes.Clone(c.tail)
	c.mu.Unlock()
	var out []string
	for line := range bytes.SplitSeq(text, []byte("\n")) {
		if s := printable(line); s != "" {
			out = append(out, s)
		}
	}
	return out[max(0, len(out)-n):]
}

// summary returns the last lines as the end of an error message, "" if nothing
// was printed.
func (c *console) summary() string {
	lines := c.lines(6)
	if len(lines) == 0 {
		return ""
	}
	return "; console: " + strings.Join(lines, " | ")
}

// escapes are the sequences by which a terminal is told to do something.
var escapes = regexp.MustCompile(`\x1b(\[[0-9;?]*[A-Za-z]?|[^\[])`)

// printable returns line without what a terminal would obey.
func printable(line []byte) string {
	line = escapes.ReplaceAll(line, nil)
	s := strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, string(line))
	if s = strings.TrimSpace(s); len(s) > 300 {
		s = s[:300]
	}
	return s
}
