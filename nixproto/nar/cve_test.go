package nar

import (
	"errors"
	"testing"
)

// One test for each advisory about Nix that the parser could be open to; the
// list is in vm/THREATS.md.

// CVE-2026-44028: nested directories without end took a parser that calls itself
// past the end of its stack, which had no guard; lengths were taken as told.
func TestCVE202644028(t *testing.T) {
	p := NewParser(Limits{})
	piece := []byte(tokens("entry", "(", "name", "d", "node", "(", "type", "directory"))
	_, err := p.Feed([]byte(archiveOf(tokens("(", "type", "directory"))))
	levels := 1
	for ; err == nil && levels < 1<<20; levels++ {
		_, err = p.Feed(piece)
	}
	if !errors.Is(err, ErrMalformed) || levels > MaxDepth+2 || p.Memory() > 64<<10 {
		t.Errorf("%d levels, %d bytes of memory: %v", levels, p.Memory(), err)
	}
	for name, archive := range map[string]string{
		"name":        archiveOf(tokens("(", "type", "directory", "entry", "(", "name")) + u64(1<<40),
		"target":      archiveOf(tokens("(", "type", "symlink", "target")) + u64(1<<40),
		"tag":         archiveOf(u64(1<<40) + tokens("(", "type", "regular", "contents", "")),
		"no target":   archiveOf(tokens("(", "type", "symlink", "target", "", ")")),
		"zero target": archiveOf(tokens("(", "type", "symlink", "target", "a\x00b", ")")),
	} {
		p := NewParser(Limits{})
		if _, err := p.Feed([]byte(archive)); !errors.Is(err, ErrMalformed) || p.Memory() > 64<<10 {
			t.Errorf("%s: %d bytes of memory: %v", name, p.Memory(), err)
		}
	}
}

// CVE-2024-45593: a symlink, and then a directory of the same name: what was in
// that was unpacked to where the symlink led.
func TestCVE202445593(t *testing.T) {
	entry := func(name, node string) string { return tokens("entry", "(", "name", name, "node") + node + tokens(")") }
	link := tokens("(", "type", "symlink", "target", "/etc", ")")
	for name, body := range map[string]string{
		"same name":   entry("a", link) + entry("a", dir("passwd")),
		"name before": entry("b", link) + entry("a", dir()) + entry("b", dir("passwd")),
		"with slash":  entry("a", link) + entry("a/passwd", dir()),
		"dots":        entry("a", link) + entry("..", dir("passwd")),
	} {
		var p Parser
		if _, err := p.Feed([]byte(archiveOf(tokens("(", "type", "directory") + body + tokens(")")))); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
