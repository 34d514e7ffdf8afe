package vm

import (
	"bytes"
	"fmt"
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

// benchPaths returns a closure of about so many inodes: paths of 60 files in
// directories of 12, as packages have them, with names that compilers, fonts
// and manuals have.
func benchPaths(b *testing.B, inodes int) []ImagePath {
	b.Helper()
	var paths []ImagePath
	for total := 0; total < inodes; {
		kids := make(map[string]*tree)
		for d := range 5 {
			files := make(map[string]*tree)
			for i := range 12 {
				files[fmt.Sprintf("some-usual-name-%d.h", i)] = file("0123456789abcdef")
			}
			kids[fmt.Sprintf("directory-%d", d)] = dir(files)
		}
		raw := dir(kids).archive(b)
		index, size, err := nar.ReadIndex(bytes.NewReader(raw))
		if err != nil {
			b.Fatal(err)
		}
		path := fmt.Sprintf("%s/%032d-package", nixproto.StoreDir, total)
		paths = append(paths, ImagePath{nixproto.StorePath(path), bytes.NewReader(raw), size, index})
		total += len(index)
	}
	return paths
}

// BenchmarkNewImage tells what a disk costs before a guest can mount it.
func BenchmarkNewImage(b *testing.B) {
	for _, inodes := range []int{30_000, 45_000} {
		b.Run(fmt.Sprint(inodes), func(b *testing.B) {
			paths := benchPaths(b, inodes)
			b.ReportAllocs()
			b.ResetTimer()
			var m *Image
			for b.Loop() {
				var err error
				if m, err = NewImage(paths); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(len(m.meta)), "metadata-B")
			b.ReportMetric(float64(len(m.files)*24), "ranges-B")
		})
	}
}

// BenchmarkImageReadAt reads 4 KiB at random places of metadata and contents.
func BenchmarkImageReadAt(b *testing.B) {
	m, err := NewImage(benchPaths(b, 45_000))
	if err != nil {
		b.Fatal(err)
	}
	p := make([]byte, 4096)
	r := rand.New(rand.NewPCG(1, 1))
	b.SetBytes(int64(len(p)))
	for b.Loop() {
		if _, err := m.ReadAt(p, r.Int64N(m.Size()/4096)*4096); err != nil && err != io.EOF {
			b.Fatal(err)
		}
	}
}
