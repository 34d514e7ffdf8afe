package vm

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"nbd/nixproto"
	"nbd/nixproto/nar"
)

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
