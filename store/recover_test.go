package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"nbd/nixproto"
	"nbd/nixproto/nar"
)

// fileNAR returns the NAR of a file.
func fileNAR(t testing.TB, contents string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := nar.NewWriter(&b)
	err := w.File("", false, int64(len(contents)))
	if err == nil {
		_, err = w.Write([]byte(contents))
	}
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// addFile uploads a path that is a file and returns it.
func addFile(t testing.TB, s *Store, a AccountID, contents string) (nixproto.StorePath, error) {
	t.Helper()
	b := fileNAR(t, contents)
	h := nixproto.SumSHA256(b)
	p, err := nixproto.MakeFixedOutputPath(nixproto.CANAR, h, "file", nil, false)
	if err != nil {
		t.Fatal(err)
	}
	u, err := s.NewUpload(context.Background(), a, UploadOptions{})
	if err != nil {
		return p, err
	}
	defer u.Abort()
	if err := u.Add(&nixproto.PathInfo{Path: p, NarHash: h, NarSize: uint64(len(b))}, bytes.NewReader(b)); err != nil {
		return p, err
	}
	return p, u.Commit()
}

// crashed copies a directory as it would be found after the process was killed
// now.
func crashed(t *testing.T, dir string) string {
	t.Helper()
	to := t.TempDir()
	if err := os.CopyFS(to, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return to
}

func mustOpen(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir, Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func mustCheck(t *testing.T, s *Store) {
	t.Helper()
	rep, err := s.Check(context.Background(), true)
	if err != nil || !rep.OK() {
		t.Errorf("check: %+v, %v", rep, err)
	}
}

// TestTornSegment loses the end of a segment, as a power failure may, at every
// point from the last commit on: nothing, all of it, and with zeros or rubbish
// where bytes were not written.
func TestTornSegment(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	s := mustOpen(t, dir)
	s.flushAfter = time.Hour
	a, err := s.AddAccount(ctx, "alice")
	if err != nil {
		t.Fatal(err)
	}
	var paths []nixproto.StorePath
	var ends []int64
	for _, contents := range []string{"one", "two", "three"} {
		p, err := addFile(t, s, a.ID, contents)
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, p)
		ends = append(ends, s.segs.last.size)
	}
	image := crashed(t, dir)
	damage := map[string]func(b []byte, at int64) []byte{
		"cut":     func(b []byte, at int64) []byte { return b[:at] },
		"zeros":   func(b []byte, at int64) []byte { clear(b[at:]); return b },
		"rubbish": func(b []byte, at int64) []byte { b[at] ^= 0x55; return b },
	}
	for name, f := range damage {
		for at := ends[1]; at < ends[2]; at += 37 {
			dir := crashed(t, image)
			seg := filepath.Join(dir, "segments", "00000001")
			b, err := os.ReadFile(seg)
			if err == nil {
				err = os.WriteFile(seg, f(b, at), 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%s at %d of %d to %d", name, at, ends[1], ends[2])
			checkTorn(t, dir, a.ID, paths, ends[1])
		}
	}
}

// checkTorn opens a store whose last commit may be damaged: all paths but the
// last one have to be valid, the last segment has to end at end if the last one
// is not, and the store has to go on.
func checkTorn(t *testing.T, dir string, a AccountID, paths []nixproto.StorePath, end int64) {
	t.Helper()
	ctx := context.Background()
	s := mustOpen(t, dir)
	valid, err := s.Valid(ctx, a, paths)
	if err != nil || len(valid) < len(paths)-1 {
		t.Fatalf("%d valid, %v", len(valid), err)
	}
	if len(valid) < len(paths) && s.segs.last.size != end {
		t.Errorf("segment ends at %d, want %d", s.segs.last.size, end)
	}
	mustCheck(t, s)
	if _, err := addFile(t, s, a, "three"); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = mustOpen(t, dir)
	if valid, err := s.Valid(ctx, a, paths); err != nil || len(valid) != len(paths) {
		t.Errorf("after another upload %d valid, %v", len(valid), err)
	}
	mustCheck(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestUnnamedFiles has Open remove what a crash left, and leave the rest.
func TestUnnamedFiles(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	s := mustOpen(t, dir)
	a, err := s.AddAccount(ctx, "alice")
	if err != nil {
		t.Fatal(err)
	}
	p, err := addFile(t, s, a.ID, string(bytes.Repeat([]byte("x"), 100<<10)))
	if err != nil {
		t.Fatal(err)
	}
	dir = crashed(t, dir)
	name := sum{0xab}.String()
	left := []string{"tmp/1", "blobs/ab/" + name, "blobs/00/" + name, "blobs/00/rubbish", "drvlogs/77"}
	for _, f := range left {
		if err := os.WriteFile(filepath.Join(dir, f), []byte("left"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s = mustOpen(t, dir)
	for _, f := range left {
		if _, err := os.Stat(filepath.Join(dir, f)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is there: %v", f, err)
		}
	}
	if _, err := s.Info(ctx, a.ID, p); err != nil {
		t.Error(err)
	}
	mustCheck(t, s)
}

func TestLocked(t *testing.T) {
	dir := t.TempDir()
	mustOpen(t, dir)
	if _, err := Open(dir, Config{}); !errors.Is(err, ErrLocked) {
		t.Errorf("second Open: %v", err)
	}
}

func TestTooNew(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, dir)
	err := s.update(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketMeta).Put(metaSchema, binary.AppendUvarint(nil, schemaVersion+1))
	})
	if err = errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, Config{}); !errors.Is(err, ErrTooNew) {
		t.Errorf("Open: %v", err)
	}
}

// TestNoSpace fails writes to the segment half-way, and refuses what would not
// leave enough free.
func TestNoSpace(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	s := mustOpen(t, dir)
	a, err := s.AddAccount(ctx, "alice")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := addFile(t, s, a.ID, "before"); err != nil {
		t.Fatal(err)
	}
	size := s.segs.last.size
	s.segs.fault = func() error { return &os.PathError{Op: "write", Path: "segment", Err: syscall.ENOSPC} }
	p, err := addFile(t, s, a.ID, "full")
	if !errors.Is(err, ErrNoSpace) {
		t.Errorf("upload: %v", err)
	}
	if s.segs.last.size != size {
		t.Errorf("segment has %d bytes, had %d", s.segs.last.size, size)
	}
	if _, err := s.Info(ctx, a.ID, p); !errors.Is(err, ErrNotFound) {
		t.Errorf("path of the failed upload: %v", err)
	}
	s.segs.fault = nil
	if _, err := addFile(t, s, a.ID, "after"); err != nil {
		t.Fatal(err)
	}
	s.cfg.MinFree = 1 << 60
	if _, err := addFile(t, s, a.ID, "small"); !errors.Is(err, ErrNoSpace) {
		t.Errorf("small upload: %v", err)
	}
	if _, err := addFile(t, s, a.ID, string(make([]byte, 1<<20))); !errors.Is(err, ErrNoSpace) {
		t.Errorf("large upload: %v", err)
	}
	if _, err := s.Stage(ctx, a.ID); !errors.Is(err, ErrNoSpace) {
		t.Errorf("stage: %v", err)
	}
	mustCheck(t, s)
	entries, err := os.ReadDir(filepath.Join(dir, "tmp"))
	if err != nil || len(entries) > 0 {
		t.Errorf("left in tmp: %v, %v", entries, err)
	}
}

// TestFullDisk fills a file system of its own.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=24m"); err != nil {
		t.Skipf("NOT TESTED: a disk that is really full; it needs root, who can mount a small one (%v). TestNoSpace has the writes that fail.", err)
	}
	defer syscall.Unmount(dir, syscall.MNT_DETACH)
	ctx := context.Background()
	s, err := Open(dir, Config{MinFree: -1})
	if err != nil {
		t.Fatal(err)
	}
	a, err := s.AddAccount(ctx, "alice")
	if err != nil {
		t.Fatal(err)
	}
	var have []nixproto.StorePath
	for i := range 1000 {
		size := 1000
		if i%3 == 0 {
			size = 300 << 10
		}
		var p nixproto.StorePath
		p, err = addFile(t, s, a.ID, string(bytes.Repeat([]byte{byte(i), byte(i >> 8)}, size)))
		if err != nil {
			break
		}
		have = append(have, p)
	}
	if !errors.Is(err, ErrNoSpace) {
		t.Fatalf("error %v after %d uploads", err, len(have))
	}
	if err := s.Close(); err != nil {
		t.Logf("close: %v", err) // the database may not be brought up to date
	}
	if s, err = Open(dir, Config{MinFree: -1}); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	valid, err := s.Valid(ctx, a.ID, have)
	if err != nil || !slices.Equal(valid, have) {
		t.Errorf("%d of %d are valid, %v", len(valid), len(have), err)
	}
	if _, err := s.Delete(ctx, a.ID, have[:len(have)/2]...); err != nil {
		t.Fatal(err)
	}
	if freed, err := s.Sweep(ctx); err != nil || freed == 0 {
		t.Errorf("sweep: %d, %v", freed, err)
	}
	if _, err := addFile(t, s, a.ID, "there is room again"); err != nil {
		t.Error(err)
	}
	mustCheck(t, s)
}
