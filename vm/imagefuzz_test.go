package vm

import (
	"io"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nbd/nixproto"
	"nbd/nixproto/nar"
)

// FuzzImageTree makes trees from random numbers, and compares their images with
// them through the eyes of an independent reader.
func FuzzImageTree(f *testing.F) {
	for i := range uint64(20) {
		f.Add(i, i*i, uint8(i))
	}
	f.Fuzz(func(t *testing.T, a, b uint64, depth uint8) {
		r := rand.New(rand.NewPCG(a, b))
		kids := make([]*tree, 1+r.IntN(6))
		for i := range kids {
			kids[i] = randomTree(r, int(depth%5))
		}
		n := store(kids...)
		want := make(manifest)
		want.describe(n, "")
		if diff := cmp.Diff(want, oracle(t, n.image(t))); diff != "" {
			t.Errorf("image differs from tree (-want +got):\n%.4000s", diff)
		}
	})
}

// FuzzImageIndex makes images of indexes that need not be those of archives: an
// index is refused, or its image can be read to the end.
func FuzzImageIndex(f *testing.F) {
	for _, name := range []string{"kinds", "names around the dots", "mixed"} {
		for _, p := range imageTrees[name]().paths(f) {
			f.Add(looseIndex(p.Index), p.Size)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, size int64) {
		if len(b) > 4<<10 || size < 0 || size > 1<<20 {
			return
		}
		index := parseLooseIndex(b)
		m, err := NewImage([]ImagePath{{nixproto.StoreDir + "/x", zeros{}, size, index}})
		if err != nil {
			return
		}
		if m.Inodes() != len(index)+1 {
			t.Errorf("Inodes = %d of %d entries", m.Inodes(), len(index))
		}
		if m.Size() > 64<<20 {
			return
		}
		if n, err := io.Copy(io.Discard, io.NewSectionReader(m, 0, m.Size())); err != nil || n != m.Size() {
			t.Errorf("read %d of %d bytes: %v", n, m.Size(), err)
		}
	})
}

// looseIndex writes an index without any of the rules that nar.Index has: for
// each entry kind, depth, lengths of name and target, offset and size in units
// of 16, then the two strings.
func looseIndex(x nar.Index) []byte {
	var b []byte
	for _, e := range x {
		b = append(b, byte(e.Kind), byte(e.Depth), byte(len(e.Name)), byte(len(e.Target)), byte(e.Offset>>4), byte(e.Size>>4))
		b = append(append(b, e.Name...), e.Target[:byte(len(e.Target))]...)
	}
	return b
}

// parseLooseIndex is the inverse of looseIndex for any bytes.
func parseLooseIndex(b []byte) nar.Index {
	var x nar.Index
	str := func(n byte) string {
		s := b[:min(int(n), len(b))]
		b = b[len(s):]
		return string(s)
	}
	for len(b) >= 6 {
		h := b[:6]
		b = b[6:]
		x = append(x, nar.Entry{Kind: nar.Kind(h[0]), Depth: int(int8(h[1])), Name: str(h[2]), Target: str(h[3]),
			Offset: int64(int8(h[4])) << 4, Size: int64(int8(h[5])) << 4})
	}
	return x
}
