package store

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// newTestSegments returns segments in an empty directory.
func newTestSegments(t *testing.T) *segments {
	t.Helper()
	return &segments{dir: t.TempDir(), open: make(map[uint64]*segment), dirty: make(map[*segment]bool)}
}

// TestAppendDurably appends pieces of all sizes in both ways, in turns, and
// reads back what it appended.
func TestAppendDurably(t *testing.T) {
	for name, prepare := range map[string]func(*segments){
		"direct":   func(*segments) {},
		"buffered": func(g *segments) { g.buffer = true },
	} {
		t.Run(name, func(t *testing.T) {
			g := newTestSegments(t)
			prepare(g)
			rnd := rand.New(rand.NewPCG(1, 2))
			var want []byte
			for i := range 300 {
				n := 8 * (1 + rnd.IntN(600))
				if i%40 == 39 {
					n = 8 * rnd.IntN(2*directLimit/8)
				}
				p := bytes.Repeat([]byte{byte(i + 1)}, n)
				frames := func(at place) ([][]byte, error) {
					if at.offset != int64(len(want)) {
						t.Fatalf("append %d goes to %d, want %d", i, at.offset, len(want))
					}
					return [][]byte{p[:n/2], p[n/2:]}, nil
				}
				var err error
				if i%7 == 6 {
					_, err = g.append(frames)
				} else {
					_, err = g.appendDurably(frames)
				}
				if err != nil {
					t.Fatal(err)
				}
				want = append(want, p...)
				got := make([]byte, len(want))
				if _, err := g.last.f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
					t.Fatalf("after append %d of %d bytes: other bytes than written, %v", i, n, err)
				}
				if i%7 != 6 && g.isDirty() {
					t.Errorf("after append %d the segment is not durable", i)
				}
			}
			if name == "direct" && g.buffer {
				t.Logf("this file system cannot write past the page cache")
			}
			file := g.path(g.last.id)
			if err := g.close(); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, want) {
				t.Errorf("closed segment has %d bytes, want %d; %v", len(got), len(want), err)
			}
		})
	}
}

// TestDirectFault fails a direct write: nothing of it is there, and appending
// goes on.
func TestDirectFault(t *testing.T) {
	g := newTestSegments(t)
	add := func(b byte) error {
		_, err := g.appendDurably(func(place) ([][]byte, error) { return [][]byte{bytes.Repeat([]byte{b}, 1000)}, nil })
		return err
	}
	if err := add(1); err != nil {
		t.Fatal(err)
	}
	g.fault = func() error { return unix.ENOSPC }
	if err := add(2); !errors.Is(err, ErrNoSpace) {
		t.Fatalf("append: %v", err)
	}
	if fi, err := g.last.f.Stat(); err != nil || fi.Size() != 1000 {
		t.Errorf("segment has %d bytes, %v", fi.Size(), err)
	}
	g.fault = nil
	if err := add(3); err != nil {
		t.Fatal(err)
	}
	want := append(bytes.Repeat([]byte{1}, 1000), bytes.Repeat([]byte{3}, 1000)...)
	got := make([]byte, len(want))
	if _, err := g.last.f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("other bytes than written, %v", err)
	}
	if err := g.close(); err != nil {
		t.Fatal(err)
	}
}
