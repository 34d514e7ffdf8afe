package store_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"nbd/nixproto"
	"nbd/store"
	"nbd/store/storetest"
)

// openBlob opens the NAR nar.
func openBlob(t *testing.T, s *store.Store, nar []byte) *store.Blob {
	t.Helper()
	b, err := s.OpenBlob(ctx, nixproto.SumSHA256(nar))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

// What a disk has changed is never handed out; the rest of the blob is.
func TestDamagedBytes(t *testing.T) {
	for _, size := range []int{40_000, 300_000} { // in a segment, in a file
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			dir := t.TempDir()
			s, err := store.Open(dir, store.Config{})
			if err != nil {
				t.Fatal(err)
			}
			nar := big(7, size)
			storetest.Add(t, s, storetest.Account(t, s, "alice"), storetest.Source("x", nar), nar)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			bad := int64(len(nar) / 2)
			flipByte(t, dir, nar[bad:][:32])
			s = storetest.OpenDir(t, dir, store.Config{})
			b := openBlob(t, s, nar)
			for _, r := range []struct {
				off, n int64
				want   error
			}{
				{0, 4096, nil}, {0, int64(len(nar)), store.ErrDamaged}, {bad, 1, store.ErrDamaged},
				{bad + 16<<10, 100, nil}, {int64(len(nar)) - 5, 5, nil},
			} {
				p := make([]byte, r.n)
				if _, err := b.ReadAt(p, r.off); !errors.Is(err, r.want) || r.want == nil && !bytes.Equal(p, nar[r.off:][:r.n]) {
					t.Errorf("%d bytes at %d: %v, want %v", r.n, r.off, err, r.want)
				}
			}
			if rep, err := s.Check(ctx, true); err != nil || len(rep.Problems) != 1 {
				t.Errorf("check says %+v, %v", rep, err)
			}
		})
	}
}

// Any range of a blob reads as it was written.
func TestReadRanges(t *testing.T) {
	s := storetest.Open(t)
	a := storetest.Account(t, s, "alice")
	r := rand.New(rand.NewPCG(1, 2))
	for i, size := range []int{0, 100, 16 << 10, 16<<10 - 112, 64 << 10, 200_001} {
		nar := big(uint64(i), size)
		storetest.Add(t, s, a, storetest.Source(fmt.Sprint("r", i), nar), nar)
		b := openBlob(t, s, nar)
		for range 200 {
			off := r.IntN(len(nar) + 1)
			n := r.IntN(len(nar) - off + 1)
			p := make([]byte, n+r.IntN(2))
			got, err := b.ReadAt(p, int64(off))
			if got < n || err != nil && err != io.EOF || !bytes.Equal(p[:n], nar[off:][:n]) {
				t.Fatalf("%d bytes at %d of %d: %d, %v", n, off, len(nar), got, err)
			}
		}
	}
}

// Injected damage is noticed like any other.
func TestInject(t *testing.T) {
	s := storetest.Open(t)
	nar := big(1, 100_000)
	storetest.Add(t, s, storetest.Account(t, s, "alice"), storetest.Source("x", nar), nar)
	b := openBlob(t, s, nar)
	ioError := errors.New("the disk is broken")
	for _, tt := range []struct {
		inject func([]byte) error
		want   error
	}{
		{func([]byte) error { return ioError }, ioError},
		{func(p []byte) error { p[0] ^= 1; return nil }, store.ErrDamaged},
		{func([]byte) error { return io.EOF }, store.ErrDamaged},
		{nil, nil},
	} {
		b.Inject(tt.inject)
		if _, err := b.ReadAt(make([]byte, 10), 50_000); !errors.Is(err, tt.want) {
			t.Errorf("got %v, want %v", err, tt.want)
		}
	}
}

// flipByte changes one bit of the file below dir in which needle lies.
func flipByte(t *testing.T, dir string, needle []byte) {
	t.Helper()
	found := false
	err := filepath.Walk(dir, func(path string, fi os.FileInfo, err error) error {
		if err != nil || fi.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		i := bytes.Index(data, needle)
		if err != nil || i < 0 {
			return err
		}
		found = true
		data[i] ^= 0x10
		return errors.Join(os.Chmod(path, 0o600), os.WriteFile(path, data, 0o600))
	})
	if err != nil || !found {
		t.Fatalf("bytes to damage: found %v, %v", found, err)
	}
}
