package server

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"unicode/utf8"
)

var cleanTests = []struct{ in, plain, coloured string }{
	{"a\tb\nc", "a\tb\nc", "a\tb\nc"},
	{"a\r\nb\rc\r", `a` + "\n" + `b\rc\x0d`, `a` + "\n" + `b\rc\x0d`},
	{"\x1b[31mred\x1b[0m", `\x1b[31mred\x1b[0m`, "\x1b[31mred\x1b[0m\x1b[0m"},
	{"\x1b[1;38:5:3mx", `\x1b[1;38:5:3mx`, "\x1b[1;38:5:3mx\x1b[0m"},
	{"\x1b[2J\x1b]0;title\x07", `\x1b[2J\x1b]0;title\x07`, `\x1b[2J\x1b]0;title\x07`},
	{"\x1b", `\x1b`, `\x1b`},
	{"\x1b[3", `\x1b[3`, `\x1b[3`},
	{"\x1b[?25l\x1bm\x1b[\x1b[m", `\x1b[?25l\x1bm\x1b[\x1b[m`, `\x1b[?25l\x1bm\x1b[` + "\x1b[m\x1b[0m"},
	{"\x1b[" + strings.Repeat("1", 100) + "m", `\x1b[` + strings.Repeat("1", 100) + "m", `\x1b[` + strings.Repeat("1", 100) + "m"},
	{"é€\u009b31m\x7f", `é€\u009b31m\x7f`, `é€\u009b31m\x7f`},
	{"\xff\xc3", `\xff\xc3`, `\xff\xc3`},
	{"a\u202eb", `a\u202eb`, `a\u202eb`},
	{"\x00\x08", `\x00\x08`, `\x00\x08`},
}

func cleaned(t testing.TB, in io.Reader, colours bool) string {
	t.Helper()
	var out bytes.Buffer
	w := newCleanWriter(&out, colours)
	if _, err := io.Copy(w, in); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestCleanWriter(t *testing.T) {
	for _, test := range cleanTests {
		for _, in := range []io.Reader{strings.NewReader(test.in), iotest.OneByteReader(strings.NewReader(test.in))} {
			if got := cleaned(t, in, false); got != test.plain {
				t.Errorf("%q: %q, want %q", test.in, got, test.plain)
			}
		}
		if got := cleaned(t, iotest.OneByteReader(strings.NewReader(test.in)), true); got != test.coloured {
			t.Errorf("%q with colours: %q, want %q", test.in, got, test.coloured)
		}
	}
}

// FuzzCleanWriter: nothing but line ends, tabs and colours is left of what
// controls a terminal, wherever the text is cut.
func FuzzCleanWriter(f *testing.F) {
	for _, test := range cleanTests {
		f.Add(test.in, true)
		f.Add(test.in, false)
	}
	f.Fuzz(func(t *testing.T, in string, colours bool) {
		got := cleaned(t, strings.NewReader(in), colours)
		if again := cleaned(t, iotest.OneByteReader(strings.NewReader(in)), colours); got != again {
			t.Errorf("%q: in one piece %q, byte by byte %q", in, got, again)
		}
		if !utf8.ValidString(got) {
			t.Errorf("%q: %q is no UTF-8", in, got)
		}
		for i, r := range got {
			if r == 0x1b && colours {
				rest := strings.TrimLeft(strings.TrimPrefix(got[i+1:], "["), "0123456789;:")
				if !strings.HasPrefix(got[i+1:], "[") || !strings.HasPrefix(rest, "m") {
					t.Errorf("%q: %q has a sequence that sets no colour", in, got)
				}
			} else if isControl(r) && r != '\n' && r != '\t' {
				t.Errorf("%q: %q has %U", in, got, r)
			}
		}
	})
}
