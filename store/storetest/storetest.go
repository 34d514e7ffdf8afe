// Package storetest gives tests a real Store in a temporary directory, and
// small paths to fill it with.
package storetest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"nbd/nixproto"
	"nbd/nixproto/nar"
	"nbd/store"
)

// Open returns a store in a temporary directory, which is closed and checked,
// with all its data, when the test ends.
func Open(t testing.TB) *store.Store {
	t.Helper()
	s := OpenDir(t, t.TempDir(), store.Config{ServerName: "test"})
	t.Cleanup(func() { Check(t, s) })
	return s
}

// OpenDir returns the store in dir, which is closed when the test ends.
func OpenDir(t testing.TB, dir string, cfg store.Config) *store.Store {
	t.Helper()
	s, err := store.Open(dir, cfg)
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

// Check fails the test if anything is wrong with the store.
func Check(t testing.TB, s *store.Store) {
	t.Helper()
	rep, err := s.Check(context.Background(), true)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range rep.Problems {
		t.Errorf("check: %s", p)
	}
}

// Account adds an account with a key of its own and returns its id.
func Account(t testing.TB, s *store.Store, name string) store.AccountID {
	t.Helper()
	a, err := s.AddAccount(context.Background(), name, Key(name))
	if err != nil {
		t.Fatal(err)
	}
	return a.ID
}

// Key returns something in the wire format of an Ed25519 SSH public key, other
// for each seed.
func Key(seed string) store.Key {
	const typ = "ssh-ed25519"
	h := sha256.Sum256([]byte(seed))
	wire := append(binary.BigEndian.AppendUint32(nil, uint32(len(typ))), typ...)
	wire = append(binary.BigEndian.AppendUint32(wire, uint32(len(h))), h[:]...)
	return store.Key{Wire: wire, Comment: seed}
}

// File returns the NAR of a regular file.
func File(contents string, executable bool) []byte {
	var b bytes.Buffer
	w := nar.NewWriter(&b)
	must(w.File("", executable, int64(len(contents))))
	_, err := w.Write([]byte(contents))
	must(err)
	must(w.Close())
	return b.Bytes()
}

// Tree returns the NAR of a directory with files; slashes in names make
// directories, and contents that begin with "->" a symbolic link.
func Tree(files map[string]string) []byte {
	var b bytes.Buffer
	w := nar.NewWriter(&b)
	must(w.Directory(""))
	writeTree(w, files)
	must(w.EndDirectory())
	must(w.Close())
	return b.Bytes()
}

// writeTree writes the entries of a directory.
func writeTree(w *nar.Writer, files map[string]string) {
	dirs := make(map[string]map[string]string)
	for name, contents := range files {
		first, rest, deep := strings.Cut(name, "/")
		if dirs[first] == nil {
			dirs[first] = make(map[string]string)
		}
		if deep {
			dirs[first][rest] = contents
		}
	}
	for _, name := range slices.Sorted(maps.Keys(dirs)) {
		contents, plain := files[name]
		target, link := strings.CutPrefix(contents, "->")
		switch {
		case !plain:
			must(w.Directory(name))
			writeTree(w, dirs[name])
			must(w.EndDirectory())
		case link:
			must(w.Symlink(name, target))
		default:
			must(w.File(name, false, int64(len(contents))))
			_, err := w.Write([]byte(contents))
			must(err)
		}
	}
}

// Source returns what is known of a path that is addressed by its content, a
// NAR, as builtins.path makes them.
func Source(name string, nar []byte, refs ...nixproto.StorePath) *nixproto.PathInfo {
	h := nixproto.SumSHA256(nar)
	ca := nixproto.ContentAddress{Method: nixproto.CANAR, Hash: h}
	refs = slices.Sorted(slices.Values(refs))
	p, err := ca.Path(name, refs, false)
	must(err)
	return &nixproto.PathInfo{Path: p, NarHash: h, NarSize: uint64(len(nar)), References: refs, CA: ca.String()}
}

// Unsigned returns what is known of a path that says nothing of its content.
// The same seed and name make the same path, whatever the NAR.
func Unsigned(seed, name string, nar []byte, refs ...nixproto.StorePath) *nixproto.PathInfo {
	h := sha256.Sum256([]byte(seed))
	p, err := nixproto.ParseBaseName(nixproto.EncodeNix32(h[:20]) + "-" + name)
	must(err)
	return &nixproto.PathInfo{
		Path: p, NarHash: nixproto.SumSHA256(nar), NarSize: uint64(len(nar)),
		References: slices.Sorted(slices.Values(refs)),
	}
}

// Add uploads one path.
func Add(t testing.TB, s *store.Store, a store.AccountID, info *nixproto.PathInfo, nar []byte) {
	t.Helper()
	u, err := s.NewUpload(context.Background(), a, store.UploadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Abort()
	if err := u.Add(info, bytes.NewReader(nar)); err != nil {
		t.Fatal(err)
	}
	if err := u.Commit(); err != nil {
		t.Fatal(err)
	}
}

// Fill uploads n small paths in one burst, each of which refers to up to three
// earlier ones, and returns what is known of them.
func Fill(t testing.TB, s *store.Store, a store.AccountID, n int) []nixproto.PathInfo {
	t.Helper()
	u, err := s.NewUpload(context.Background(), a, store.UploadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Abort()
	infos := make([]nixproto.PathInfo, 0, n)
	for i := range n {
		var refs []nixproto.StorePath
		for _, back := range []int{1, 2, 10} {
			if i >= back {
				refs = append(refs, infos[i-back].Path)
			}
		}
		nar := Tree(map[string]string{
			"bin/tool":  fmt.Sprintf("#!/bin/sh\necho %d of account %d\n", i, a),
			"share/doc": strings.Repeat("word ", i%50),
			"link":      "->bin/tool",
		})
		info := Source(fmt.Sprintf("path-%d", i), nar, refs...)
		if err := u.Add(info, bytes.NewReader(nar)); err != nil {
			t.Fatal(err)
		}
		infos = append(infos, *info)
	}
	if err := u.Commit(); err != nil {
		t.Fatal(err)
	}
	return infos
}

// must panics: what a test made up is malformed.
func must(err error) {
	if err != nil {
		panic(err)
	}
}
