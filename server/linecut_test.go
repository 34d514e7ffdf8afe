package server

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// cut returns what a lineCutter makes of some pieces.
func cut(pieces ...string) []string {
	var got []string
	c := &lineCutter{
		line:  func(p []byte) { got = append(got, string(p)) },
		phase: func(name string) { got = append(got, "PHASE "+name) },
		note:  func(text string) { got = append(got, "NOTE "+text) },
	}
	for _, p := range pieces {
		_, _ = c.Write([]byte(p)) // never fails
	}
	c.Flush()
	return got
}

var lineTests = []struct {
	name, in string
	want     []string
}{
	{"lines", "a\nb\n", []string{"a", "b"}},
	{"last without newline", "a\nb", []string{"a", "b"}},
	{"empty", "", nil},
	{"blank lines", "\n\n", []string{"", ""}},
	{"carriage return", "x\rprogress 1\rprogress 2\n", []string{"progress 2"}},
	{"shorter after carriage return", "abcdef\rxy\n", []string{"xycdef"}},
	{"CRLF", "cr one\rcr two\r\n", []string{"cr two"}},
	{"CR at the end", "abc\r", []string{"abc"}},
	{"colours and junk", "\x1b[31mred\x1b[0m\x00\xff\xfe\n", []string{"\x1b[31mred\x1b[0m\x00\xff\xfe"}},
	{"phase", "a\n" + `@nix {"action":"setPhase","phase":"buildPhase"}` + "\nb\n", []string{"a", "PHASE buildPhase", "b"}},
	{"phase without newline", `@nix {"action":"setPhase","phase":"p"}`, []string{"PHASE p"}},
	{"message", `@nix {"action":"msg","level":1,"msg":"hear"}` + "\n", []string{"NOTE hear"}},
	{"debug message", `@nix {"action":"msg","level":6,"msg":"hear"}` + "\n", nil},
	{"unknown action", `@nix {"action":"nonsense"}` + "\n", nil},
	{"activity", `@nix {"action":"start","id":1,"level":3,"type":105,"text":"x"}` + "\n", nil},
	{"not JSON", "@nix not json\n", []string{"@nix not json"}},
	{"no object", "@nix 5\n@nix []\n@nix null\n", []string{"@nix 5", "@nix []", "@nix null"}},
	{"no action", `@nix {"phase":"x"}` + "\n", []string{`@nix {"phase":"x"}`}},
	{"no phase", `@nix {"action":"setPhase"}` + "\n", []string{`@nix {"action":"setPhase"}`}},
	{"phase of a wrong type", `@nix {"action":"setPhase","phase":1}` + "\n", []string{`@nix {"action":"setPhase","phase":1}`}},
	{"not at the start", ` @nix {"action":"nonsense"}` + "\n", []string{` @nix {"action":"nonsense"}`}},
}

func TestLineCutter(t *testing.T) {
	for _, test := range lineTests {
		t.Run(test.name, func(t *testing.T) {
			if diff := cmp.Diff(test.want, cut(test.in)); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(test.want, cut(strings.Split(test.in, "")...)); diff != "" {
				t.Error("byte by byte: " + diff)
			}
		})
	}
}

func TestLongLines(t *testing.T) {
	long := strings.Repeat("x", 2<<20)
	if diff := cmp.Diff([]string{long, "the end"}, cut(long[:5000], long[5000:]+"\nthe end\n")); diff != "" {
		t.Error("a line of 2 MiB does not come whole")
	}
	var sizes []int
	for _, line := range cut(strings.Repeat("y", 2*maxLogLine+1) + "\n") {
		sizes = append(sizes, len(line))
	}
	if diff := cmp.Diff([]int{maxLogLine, maxLogLine, 1}, sizes); diff != "" {
		t.Error(diff)
	}
}

// FuzzLineCutter compares with a model that knows one byte at a time, as Nix
// does it.
func FuzzLineCutter(f *testing.F) {
	for _, test := range lineTests {
		f.Add([]byte(test.in), 3)
	}
	f.Fuzz(func(t *testing.T, in []byte, at int) {
		at = max(0, min(at, len(in)))
		got := fmt.Sprintf("%q", cut(string(in[:at]), string(in[at:])))
		if want := fmt.Sprintf("%q", modelCut(in)); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	})
}

func modelCut(in []byte) []string {
	var lines []string
	var line []byte
	pos := 0
	flush := func() {
		// Only the cutting is modelled; what a line means is looked up.
		if bytes.HasPrefix(line, []byte("@nix ")) {
			lines = append(lines, cut(string(line)+"\n")...)
		} else {
			lines = append(lines, string(line))
		}
		line, pos = nil, 0
	}
	for _, c := range in {
		switch {
		case c == '\r':
			pos = 0
		case c == '\n':
			flush()
		default:
			if pos == len(line) {
				line = append(line, 0)
			}
			line[pos] = c
			pos++
		}
	}
	if len(line) > 0 {
		flush()
	}
	return lines
}
