package store_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	bolt "go.etcd.io/bbolt"

	"nbd/store"
	"nbd/store/storetest"
)

func TestRuns(t *testing.T) {
	dir := t.TempDir()
	s := storetest.OpenDir(t, dir, store.Config{})
	alice, bob := storetest.Account(t, s, "alice"), storetest.Account(t, s, "bob")
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	run := func(pkg, version string, n int) store.Run {
		return store.Run{System: "x86_64-linux", Package: pkg, Version: version, Build: store.BuildID(n), Time: start.Add(time.Duration(n) * time.Hour),
			CPUs: n, MemoryMiB: 2048, DiskMiB: 1024, PeakMemory: 5, PeakDisk: 6, CPUTime: time.Minute, Wall: time.Second, ShortMemoryMiB: 1024, ShortDiskMiB: 512}
	}
	note := func(a store.AccountID, r store.Run) {
		t.Helper()
		s.NoteRun(a, r)
		if err := s.EndBuild(ctx, nil); err != nil {
			t.Fatal(err)
		}
	}
	check := func(a store.AccountID, system, pkg string, want ...store.Run) {
		t.Helper()
		got, err := s.Runs(ctx, a, system, pkg)
		if err != nil {
			t.Fatal(err)
		}
		slices.SortFunc(got, func(a, b store.Run) int { return a.Time.Compare(b.Time) })
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
	first, second, none, other := run("hello", "1.0", 1), run("hello", "1.1", 2), run("hello", "", 3), run("hell", "o", 4)
	note(alice, run("hello", "1.0", 9))
	for _, r := range []store.Run{first, second, none, other} {
		note(alice, r)
	}
	note(bob, run("bobs", "1", 1))
	check(alice, "x86_64-linux", "hello", first, second, none)
	check(alice, "x86_64-linux", "hell", other)
	check(alice, "i686-linux", "hello")
	check(alice, "x86_64-linux", "bobs")
	check(bob, "x86_64-linux", "hello")

	// A package keeps those of its versions that were run last.
	for n := range 20 {
		note(alice, run("many", fmt.Sprint(n), n))
	}
	var last []store.Run
	for n := 12; n < 20; n++ {
		last = append(last, run("many", fmt.Sprint(n), n))
	}
	check(alice, "x86_64-linux", "many", last...)

	if err := s.RemoveAccount(ctx, bob); err != nil {
		t.Fatal(err)
	}
	note(bob, run("bobs", "1", 1))
	check(bob, "x86_64-linux", "bobs")

	// What was noted a moment before the end is there, and a database of
	// before there was a history has none.
	s.NoteRun(alice, second)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = storetest.OpenDir(t, dir, store.Config{})
	check(alice, "x86_64-linux", "hello", first, second, none)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := bolt.Open(filepath.Join(dir, "nbd.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Update(func(tx *bolt.Tx) error { return tx.DeleteBucket([]byte("history")) }); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	s = storetest.OpenDir(t, dir, store.Config{})
	check(alice, "x86_64-linux", "hello")
	note(alice, first)
	check(alice, "x86_64-linux", "hello", first)
}

// A record that is damaged keeps no build from its end, and is the first to go.
func TestRunsDamaged(t *testing.T) {
	dir := t.TempDir()
	s := storetest.OpenDir(t, dir, store.Config{})
	alice := storetest.Account(t, s, "alice")
	note := func(version int) error {
		s.NoteRun(alice, store.Run{System: "x", Package: "p", Version: fmt.Sprint(version), Time: time.Unix(int64(version), 0)})
		return s.EndBuild(ctx, nil)
	}
	for version := range 8 {
		if err := note(version); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := bolt.Open(filepath.Join(dir, "nbd.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		name, _ := tx.Bucket([]byte("history")).Cursor().First()
		b := tx.Bucket([]byte("history")).Bucket(name)
		last, _ := b.Cursor().Last()
		return b.Put(last, []byte("junk"))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	s = storetest.OpenDir(t, dir, store.Config{})
	if err := note(8); err != nil {
		t.Fatal(err)
	}
	if list, err := s.Runs(ctx, alice, "x", "p"); err != nil || len(list) != 8 {
		t.Errorf("%d runs are known: %v", len(list), err)
	}
}

// TestRunsAreBounded writes more packages than an account's history holds.
func TestRunsAreBounded(t *testing.T) {
	s := storetest.Open(t)
	alice := storetest.Account(t, s, "alice")
	const total, kept = 21000, 20000
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for n := range total {
		s.NoteRun(alice, store.Run{System: "x", Package: fmt.Sprint("p", n), Version: "1", Time: start.Add(time.Duration(n) * time.Second)})
	}
	if err := s.EndBuild(ctx, nil); err != nil {
		t.Fatal(err)
	}
	there, recent := 0, 0
	for n := range total {
		list, err := s.Runs(ctx, alice, "x", fmt.Sprint("p", n))
		if err != nil {
			t.Fatal(err)
		}
		there += len(list)
		if n >= total/2 {
			recent += len(list)
		}
	}
	if there != kept || recent < total/2-20 {
		t.Errorf("%d records are kept, %d of the younger half", there, recent)
	}
}
