package upstream

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func readXZ(b []byte, size int64) ([]byte, error) {
	return io.ReadAll(io.LimitReader(newXZReader(bufio.NewReader(bytes.NewReader(b)), size), 1<<22))
}

func goldenXZ(t testing.TB) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(golden, "blocks.xz"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Several streams and blocks, with padding between.
func TestXZ(t *testing.T) {
	var want strings.Builder
	for i := 1; i <= 6000; i++ {
		if i <= 4000 || i >= 5000 {
			fmt.Fprintln(&want, i)
		}
	}
	b := goldenXZ(t)
	got, err := readXZ(b, 1<<16)
	if err != nil || string(got) != want.String() {
		t.Errorf("%d bytes, want %d: %v", len(got), want.Len(), err)
	}
	padded := append(append(bytes.Clone(b), 0, 0, 0, 0, 0, 0, 0, 0), b...)
	if got, err := readXZ(padded, 1<<16); err != nil || string(got) != want.String()+want.String() {
		t.Errorf("padded: %d bytes: %v", len(got), err)
	}
	for i := range b {
		if got, err := readXZ(b[:i], 1<<16); err == nil && len(got) == want.Len() {
			t.Errorf("cut at %d of %d: no error", i, len(b))
		}
	}
}

func TestXZDictionary(t *testing.T) {
	b := goldenXZ(t)
	at := bytes.Index(b[:40], []byte{0x21, 1}) + 2
	b[at] = 40 // 4 GiB
	if _, err := readXZ(b, 1<<16); err == nil || !strings.Contains(err.Error(), "dictionary") {
		t.Errorf("a dictionary of 4 GiB: %v", err)
	}
	b[at] = 28 // 64 MiB
	if _, err := readXZ(b, 1<<40); err != nil {
		t.Error(err)
	}
	// Many blocks that hold nothing: 64 MiB of memory for each 24 bytes.
	many := bytes.Clone(b[:12])
	block := []byte{2, 0, 0x21, 1, 28, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	for range 100 {
		many = append(many, block...)
	}
	if _, err := readXZ(many, 1<<40); err == nil || !strings.Contains(err.Error(), "many small blocks") {
		t.Errorf("many empty blocks: %v", err)
	}
}

func FuzzXZ(f *testing.F) {
	f.Add(goldenXZ(f))
	files, err := filepath.Glob(filepath.Join(golden, "xz", "nar", "*.xz"))
	if err != nil || len(files) == 0 {
		f.Fatal(err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := decoder("xz", bytes.NewReader(b), 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, io.LimitReader(d, 1<<20)) // any error, no panic
	})
}
