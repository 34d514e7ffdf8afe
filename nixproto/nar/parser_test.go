package nar

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"
	"unsafe"
)

// tokens joins strings as an archive does.
func tokens(ss ...string) string {
	var b strings.Builder
	for _, s := range ss {
		b.WriteString(token(s))
	}
	return b.String()
}

// archiveOf returns an archive whose root is made of those tokens.
func archiveOf(root string) string { return tokens("nix-archive-1") + root }

// dir returns a directory with entries of those names, each an empty file.
func dir(names ...string) string {
	s := tokens("(", "type", "directory")
	for _, name := range names {
		s += tokens("entry", "(", "name", name, "node", "(", "type", "regular", "contents", "", ")", ")")
	}
	return s + tokens(")")
}

func nested(levels int) string {
	return strings.Repeat(tokens("(", "type", "directory", "entry", "(", "name", "d", "node"), levels-1) +
		dir() + strings.Repeat(tokens(")", ")"), levels-1)
}

func u64(n uint64) string { return string(binary.LittleEndian.AppendUint64(nil, n)) }

func TestParseMalformed(t *testing.T) {
	file := func(s string) string { return tokens("(", "type", "regular", "contents") + s }
	tests := map[string]string{
		"other magic":                tokens("nix-archive-2") + dir(),
		"magic with padding":         u64(13) + "nix-archive-1\x00\x00\x01" + dir(),
		"no node":                    archiveOf(tokens("")),
		"not a node":                 archiveOf(tokens(")", "type", "directory", ")")),
		"unknown kind":               archiveOf(tokens("(", "type", "fifo", ")")),
		"long kind":                  archiveOf(tokens("(", "type", "directories", ")")),
		"no kind":                    archiveOf(tokens("(", ")")),
		"kind twice":                 archiveOf(tokens("(", "type", "regular", "type", "regular", "contents", "", ")")),
		"file without contents":      archiveOf(tokens("(", "type", "regular", ")")),
		"executable not empty":       archiveOf(tokens("(", "type", "regular", "executable", "x", "contents", "", ")")),
		"executable twice":           archiveOf(tokens("(", "type", "regular", "executable", "", "executable", "", "contents", "", ")")),
		"executable after":           archiveOf(tokens("(", "type", "regular", "contents", "", "executable", "", ")")),
		"contents twice":             archiveOf(tokens("(", "type", "regular", "contents", "", "contents", "", ")")),
		"contents padding":           archiveOf(file(u64(1) + "x\x00\x00\x00\x00\x00\x00\x01" + tokens(")"))),
		"contents of 2^64-1 bytes":   archiveOf(file(u64(1<<64 - 1))),
		"contents of 2^63-1 bytes":   archiveOf(file(u64(1<<63 - 1))),
		"contents longer":            archiveOf(file(u64(8) + tokens(")"))),
		"contents shorter":           archiveOf(file(u64(0) + "12345678" + tokens(")"))),
		"file not ended":             archiveOf(file(tokens("", "entry"))),
		"token padding":              archiveOf(u64(1) + "(\x00\x00\x00\x00\x00\x00\x01"),
		"token not in shortest form": archiveOf(u64(2) + "(\x00\x00\x00\x00\x00\x00\x00"),
		"symlink without target":     archiveOf(tokens("(", "type", "symlink", ")")),
		"empty target":               archiveOf(tokens("(", "type", "symlink", "target", "", ")")),
		"long target":                archiveOf(tokens("(", "type", "symlink", "target", strings.Repeat("x", 4096), ")")),
		"target with NUL":            archiveOf(tokens("(", "type", "symlink", "target", "a\x00b", ")")),
		"target padding":             archiveOf(tokens("(", "type", "symlink", "target") + u64(1) + "x\x00\x00\x00\x00\x00\x00\x01"),
		"target twice":               archiveOf(tokens("(", "type", "symlink", "target", "x", "target", "x", ")")),
		"executable symlink":         archiveOf(tokens("(", "type", "symlink", "executable", "", "target", "x", ")")),
		"empty name":                 archiveOf(dir("")),
		"name .":                     archiveOf(dir(".")),
		"name ..":                    archiveOf(dir("..")),
		"name with slash":            archiveOf(dir("a/b")),
		"name with NUL":              archiveOf(dir("a\x00")),
		"long name":                  archiveOf(dir(strings.Repeat("x", 256))),
		"name of 2^64-1 bytes":       archiveOf(tokens("(", "type", "directory", "entry", "(", "name") + u64(1<<64-1)),
		"name padding":               archiveOf(tokens("(", "type", "directory", "entry", "(", "name") + u64(1) + "a\x00\x00\x00\x00\x00\x00\x01" + tokens("node", "(", "type")),
		"same name":                  archiveOf(dir("a", "a")),
		"order":                      archiveOf(dir("b", "a")),
		"order is bytewise":          archiveOf(dir("a", "B")),
		"unknown tag in directory":   archiveOf(tokens("(", "type", "directory", "x", ")")),
		"entry without node":         archiveOf(tokens("(", "type", "directory", "entry", "(", "name", "a", ")", ")")),
		"entry without name":         archiveOf(tokens("(", "type", "directory", "entry", "(", "node", "(", "type", "directory", ")", ")", ")")),
		"entry not ended":            archiveOf(tokens("(", "type", "directory", "entry", "(", "name", "a", "node", "(", "type", "directory", ")", "entry", ")")),
		"65 levels":                  archiveOf(nested(65)),
	}
	for name, archive := range tests {
		t.Run(name, func(t *testing.T) {
			archive += strings.Repeat(tokens(")"), 4) // enough to see what is wrong
			for _, size := range []int{1, 5, len(archive)} {
				if err := parsePieces(archive, size); !errors.Is(err, ErrMalformed) || strings.Contains(err.Error(), "ends early") {
					t.Errorf("in pieces of %d: %v", size, err)
				}
			}
		})
	}
	if err := parsePieces(archiveOf(nested(64)), 1); err != nil {
		t.Errorf("64 levels: %v", err)
	}
}

// parsePieces parses all of archive in pieces of a size.
func parsePieces(archive string, size int) error {
	var p Parser
	for len(archive) > 0 {
		n, err := p.Feed([]byte(archive[:min(size, len(archive))]))
		if err != nil {
			if _, again := p.Feed([]byte("x")); again != err {
				return fmt.Errorf("error does not stay: %v", again)
			}
			return err
		}
		if p.Done() && n < len(archive) {
			return fmt.Errorf("%d bytes after the end", len(archive)-n)
		}
		archive = archive[n:]
	}
	return p.Close()
}

func TestParseTruncated(t *testing.T) {
	for _, tt := range narTests {
		archive := golden(t, tt.name)
		for n := range archive {
			var p Parser
			if taken, err := p.Feed(archive[:n]); err != nil || taken != n {
				t.Fatalf("%s: Feed(first %d bytes) = %d, %v", tt.name, n, taken, err)
			}
			if p.Done() || !errors.Is(p.Close(), ErrMalformed) {
				t.Fatalf("%s: complete after %d bytes of %d", tt.name, n, len(archive))
			}
		}
	}
}

func TestParseLimits(t *testing.T) {
	archive := golden(t, "tree")
	text := int64(len("bin" + "alias" + "run" + "run" + "zero" + "lib" + "empty" + "zeros" + "share" + "doc" + "a" + "doc.txt" + "z"))
	for _, tt := range []struct {
		limits Limits
		ok     bool
	}{
		{Limits{Entries: 13}, true},
		{Limits{Entries: 12}, false},
		{Limits{Text: text}, true},
		{Limits{Text: text - 1}, false},
	} {
		_, err := NewParser(tt.limits).Feed(archive)
		if (err == nil) != tt.ok {
			t.Errorf("%+v: %v", tt.limits, err)
		}
		if err != nil && (!errors.Is(err, ErrTooLarge) || !errors.Is(err, ErrMalformed)) {
			t.Errorf("%+v: %v", tt.limits, err)
		}
	}
}

// What an index takes follows its entries, not the bytes of files.
func TestParserMemory(t *testing.T) {
	if n := unsafe.Sizeof(Entry{}); n != entryMemory {
		t.Errorf("an entry takes %d bytes", n)
	}
	p := new(Parser)
	if _, err := p.Feed(manyFiles(t, 1000)); err != nil {
		t.Fatal(err)
	}
	n := int64(len(p.Index()))
	if m := p.Memory(); m < n*entryMemory || m > 3*n*entryMemory {
		t.Errorf("%d bytes for %d entries", m, n)
	}
}

// Without an index the end of an archive is found all the same.
func TestParseEndOnly(t *testing.T) {
	b := manyFiles(t, 1000)
	p := NewParser(Limits{EndOnly: true})
	n, err := p.Feed(append(b, "behind"...))
	if n != len(b) || err != nil || !p.Done() {
		t.Errorf("took %d of %d bytes, done %t, %v", n, len(b), p.Done(), err)
	}
	if p.Index() != nil || cap(p.index) > 8 {
		t.Errorf("there is an index, with room for %d entries", cap(p.index))
	}
	p = NewParser(Limits{EndOnly: true, Entries: 100})
	if _, err := p.Feed(b); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too many entries: %v", err)
	}
}

// FuzzParse wants of every archive that is taken: in pieces it is the same, and
// written again from its index it has the same bytes, so there is one archive
// for a tree.
func FuzzParse(f *testing.F) {
	for _, tt := range narTests {
		f.Add(golden(f, tt.name), uint8(3))
	}
	f.Fuzz(func(t *testing.T, b []byte, size uint8) {
		var p Parser
		n, err := p.Feed(b)
		end := NewParser(Limits{EndOnly: true})
		if m, endErr := end.Feed(b); m != n || (endErr == nil) != (err == nil) || end.Done() != p.Done() {
			t.Fatalf("took %d bytes, %v; without an index %d, %v", n, err, m, endErr)
		}
		if n > len(b) || (err == nil && !p.Done() && n != len(b)) {
			t.Fatalf("took %d of %d bytes, error %v", n, len(b), err)
		}
		if err == nil && p.Done() != (p.Close() == nil) {
			t.Fatalf("Done = %v, Close = %v", p.Done(), p.Close())
		}
		pieces := parsePieces(string(b[:n]), int(size)+1)
		if (pieces == nil) != p.Done() {
			t.Fatalf("in pieces: %v; whole: %v", pieces, err)
		}
		if !p.Done() {
			return
		}
		var buf bytes.Buffer
		if err := write(NewWriter(&buf), nodes(p.Index(), b)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(buf.Bytes(), b[:n]) {
			t.Fatalf("%q\nbecame %q", b[:n], buf.Bytes())
		}
		checkIndex(t, p.Index(), int64(n))
	})
}

// manyFiles returns an archive of n files of 100 bytes.
func manyFiles(tb testing.TB, n int) []byte {
	var buf bytes.Buffer
	w := NewWriter(&buf)
	tree := []node{{Kind: Directory}}
	for i := range n {
		if i%100 == 0 {
			tree = append(tree, node{Directory, false, 1, fmt.Sprintf("dir-%06d", i), ""})
		}
		tree = append(tree, node{Regular, i%7 == 0, 2, fmt.Sprintf("some-file-%06d", i), strings.Repeat("x", 100)})
	}
	if err := write(w, tree); err != nil {
		tb.Fatal(err)
	}
	return buf.Bytes()
}

func BenchmarkParseSmallFiles(b *testing.B) {
	const files = 50000
	archive := manyFiles(b, files)
	b.ReportAllocs()
	for b.Loop() {
		var p Parser
		if _, err := p.Feed(archive); err != nil || !p.Done() {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/files, "ns/file")
}

func BenchmarkParseLargeFile(b *testing.B) {
	const size, piece = 1 << 30, 1 << 20
	head := []byte(archiveOf(tokens("(", "type", "regular", "contents")) + u64(size))
	body := make([]byte, piece)
	tail := []byte(tokens(")"))
	b.SetBytes(size)
	b.ReportAllocs()
	for b.Loop() {
		var p Parser
		p.Feed(head)
		for range size / piece {
			p.Feed(body)
		}
		p.Feed(tail)
		if !p.Done() {
			b.Fatal(p.Close())
		}
	}
}
