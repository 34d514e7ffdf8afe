package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nbd/nixproto"
	"nbd/store"
	"nbd/store/storetest"
)

func TestBuilds(t *testing.T) {
	dir := t.TempDir()
	s := storetest.OpenDir(t, dir, store.Config{})
	alice, bob := storetest.Account(t, s, "alice"), storetest.Account(t, s, "bob")
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	var builds []store.Build
	for i := range 10 {
		a := alice
		if i%5 == 4 {
			a = bob
		}
		b := store.Build{Account: a, Name: fmt.Sprint(i), Status: store.StatusRunning, Created: start.Add(time.Duration(i) * time.Minute), Tags: map[string]string{"n": fmt.Sprint(i % 2)}}
		if err := s.NewBuild(ctx, &b); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			b.Status = store.StatusBuilt
			if err := s.WriteBuild(ctx, &b); err != nil {
				t.Fatal(err)
			}
		}
		builds = append(builds, b)
	}
	ids := func(f store.BuildFilter) (ids []store.BuildID) {
		t.Helper()
		list, err := s.Builds(ctx, alice, f)
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range list {
			ids = append(ids, b.ID)
		}
		return ids
	}
	for _, tt := range []struct {
		name string
		f    store.BuildFilter
		want []store.BuildID
	}{
		{"all", store.BuildFilter{}, []store.BuildID{9, 8, 7, 6, 4, 3, 2, 1}},
		{"limit", store.BuildFilter{Limit: 3}, []store.BuildID{9, 8, 7}},
		{"page", store.BuildFilter{Limit: 3, Before: 7}, []store.BuildID{6, 4, 3}},
		{"status", store.BuildFilter{Status: []string{store.StatusBuilt}}, []store.BuildID{9, 7, 3, 1}},
		{"time", store.BuildFilter{From: builds[2].Created, To: builds[6].Created}, []store.BuildID{6, 4, 3}},
		{"tag", store.BuildFilter{Match: func(b *store.Build) bool { return b.Tags["n"] == "1" }}, []store.BuildID{8, 6, 4, 2}},
	} {
		if diff := cmp.Diff(tt.want, ids(tt.f)); diff != "" {
			t.Errorf("%s: %s", tt.name, diff)
		}
	}
	if _, err := s.Build(ctx, 99); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("build 99: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = storetest.OpenDir(t, dir, store.Config{})
	for _, b := range builds {
		got, err := s.Build(ctx, b.ID)
		if err != nil {
			t.Fatal(err)
		}
		if b.Status == store.StatusRunning {
			b.Status, b.Error, b.Stopped = store.StatusInternalError, got.Error, got.Stopped
		}
		if diff := cmp.Diff(b, *got); diff != "" {
			t.Error(diff)
		}
	}
}

// Requests that were refused are told from those that were answered without a
// run, also when a record changes from one into the other.
func TestRefusedBuilds(t *testing.T) {
	s := storetest.OpenDir(t, t.TempDir(), store.Config{})
	alice, bob := storetest.Account(t, s, "alice"), storetest.Account(t, s, "bob")
	for _, b := range []store.Build{
		{Account: bob, Status: store.StatusBuilt}, // 1
		{Account: alice, Status: store.StatusBuilt},
		{Account: alice, Status: store.StatusBuilt, Reused: true},
		{Account: alice, Status: store.StatusClientError, Reused: true},
		{Account: alice, Status: store.StatusClientError},
		{Account: alice, Status: store.StatusRunning, Reused: true}, // 6
	} {
		b.Created = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
		if err := s.NewBuild(ctx, &b); err != nil {
			t.Fatal(err)
		}
	}
	changed, err := s.Build(ctx, 6)
	if err != nil {
		t.Fatal(err)
	}
	changed.Status = store.StatusClientError
	if err := s.WriteBuild(ctx, changed); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		f    store.BuildFilter
		want []store.BuildID
	}{
		{store.BuildFilter{}, []store.BuildID{5, 2}},
		{store.BuildFilter{Refused: true}, []store.BuildID{6, 5, 4, 2}},
		{store.BuildFilter{Reused: true}, []store.BuildID{6, 5, 4, 3, 2}},
		{store.BuildFilter{Refused: true, Status: []string{store.StatusClientError}, Limit: 2}, []store.BuildID{6, 5}},
	} {
		list, err := s.Builds(ctx, alice, tt.f)
		var got []store.BuildID
		for _, b := range list {
			got = append(got, b.ID)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" || err != nil {
			t.Errorf("%+v: %v, %s", tt.f, err, diff)
		}
	}
	u, err := s.Usage(ctx, alice, changed.Created)
	if err != nil || u.Builds != 2 || u.Reused != 1 {
		t.Errorf("usage %+v, %v", u, err)
	}
	if err := s.RemoveAccount(ctx, bob); err != nil {
		t.Fatal(err)
	}
	if list, err := s.BuildAccounts(ctx); err != nil || !cmp.Equal(list, []store.AccountID{alice, bob}) {
		t.Errorf("accounts %v, %v", list, err)
	}
}

func TestEnds(t *testing.T) {
	s := storetest.Open(t)
	alice := storetest.Account(t, s, "alice")
	nar := storetest.File("x", false)
	x := storetest.Unsigned("x", "x", nar)
	storetest.Add(t, s, alice, x, nar)
	key, other := [32]byte{1}, [32]byte{1, 1}
	success := func(build store.BuildID, hash nixproto.Hash) *store.Result {
		return &store.Result{Build: build, Account: alice, Outputs: map[string]store.ResultOutput{"out": {Path: x.Path, NarHash: hash, NarSize: 7}}}
	}
	put := func(e store.End) {
		t.Helper()
		if err := s.EndBuild(ctx, nil, e); err != nil {
			t.Fatal(err)
		}
	}
	get := func(key [32]byte, own store.AccountID) *store.Ends {
		t.Helper()
		e, err := s.Ends(ctx, key, own)
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	if e := get(key, 0); e.Success != nil || len(e.Failures)+len(e.Timeouts) > 0 {
		t.Errorf("nothing stored: %+v", e)
	}
	// Bytes that are gone do not count; those that are there stay.
	for build, want := range []store.BuildID{1, 2, 3, 3} {
		hash := nixproto.SumSHA256(nil)
		if build >= 2 {
			hash = x.NarHash
		}
		put(store.End{Key: key, Shared: true, Success: success(store.BuildID(build+1), hash)})
		if got := get(key, 0).Success; got == nil || got.Build != want {
			t.Errorf("after success %d: %+v", build+1, got)
		}
	}
	if e := get(key, alice); e.Success != nil {
		t.Errorf("a shared end is stored as an own one: %+v", e)
	}
	put(store.End{Key: other, Own: alice, Failure: &store.Failure{Build: 5, Message: "m"}, Generation: "a"})
	put(store.End{Key: key, Own: alice, Shared: true, Failure: &store.Failure{Build: 6}, Generation: "b"})
	put(store.End{Key: key, Shared: true, Failure: &store.Failure{Build: 7}, Generation: "b"})
	if e := get(other, alice); e.Failures["a"].Build != 5 || len(get(other, 0).Failures) != 0 {
		t.Errorf("own failure: %+v", e)
	}
	if e := get(key, 0); e.Failures["b"].Build != 7 || e.Success.Build != 3 || get(key, alice).Failures["b"].Build != 6 {
		t.Errorf("failures: %+v", e)
	}
	for i, after := range []time.Duration{5, 9, 3} {
		put(store.End{Key: key, Shared: true, Kind: store.TimeoutRun, Timeout: &store.Timeout{Failure: store.Failure{Build: store.BuildID(i + 1)}, After: after}})
	}
	put(store.End{Key: key, Shared: true, Kind: store.TimeoutSilent, Timeout: &store.Timeout{After: 1}})
	if e := get(key, 0).Timeouts; e[store.TimeoutRun].Build != 2 || e[store.TimeoutSilent].After != 1 {
		t.Errorf("timeouts: %+v", e)
	}
	for _, recipe := range []string{"first", "second"} { // the first one stays
		if err := s.WriteRecipe(ctx, key, []byte(recipe)); err != nil {
			t.Fatal(err)
		}
		if got, err := s.Recipe(ctx, key); string(got) != "first" || err != nil {
			t.Errorf("recipe %q, %v", got, err)
		}
	}
	if _, err := s.Recipe(ctx, other); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("no recipe: %v", err)
	}
	if n, err := s.RevokeEnds(ctx, key); n != 2 || err != nil {
		t.Errorf("revoked %d, %v", n, err)
	}
	if e := get(key, 0); e.Success != nil || e.Failures != nil {
		t.Errorf("after revocation: %+v", e)
	}
	if e := get(other, alice); len(e.Failures) != 1 {
		t.Errorf("a key that begins alike was revoked: %+v", e)
	}
}

// What bytes are held is not removed, though nobody has them.
func TestHold(t *testing.T) {
	s := storetest.Open(t)
	alice := storetest.Account(t, s, "alice")
	nar := storetest.File("x", false)
	x := storetest.Unsigned("x", "x", nar)
	storetest.Add(t, s, alice, x, nar)
	hold, err := s.Hold(x.NarHash)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Delete(ctx, alice, x.Path); err != nil {
		t.Fatal(err)
	}
	for _, want := range []bool{true, false} {
		if _, err := s.Sweep(ctx); err != nil {
			t.Fatal(err)
		}
		if ok, err := s.HasBlob(ctx, x.NarHash); ok != want || err != nil {
			t.Errorf("stored: %v, want %v, %v", ok, want, err)
		}
		if want {
			hold.Release()
		}
	}
}

// Records are visible at once, ids are never used again, and what EndBuild
// returned from survives a crash.
func TestBuildWrites(t *testing.T) {
	dir := t.TempDir()
	s := storetest.OpenDir(t, dir, store.Config{})
	alice := storetest.Account(t, s, "alice")
	created := time.Date(2026, 10, 31, 23, 0, 0, 0, time.UTC)
	var last store.BuildID
	write := func(change func(*store.Build)) store.Build {
		t.Helper()
		id, err := s.ReserveBuild(ctx)
		if err != nil || id <= last {
			t.Fatalf("id %d after %d, %v", id, last, err)
		}
		last = id
		b := store.Build{ID: id, Account: alice, Status: store.StatusRunning, Created: created}
		change(&b)
		if err := s.WriteBuild(ctx, &b); err != nil {
			t.Fatal(err)
		}
		got, err := s.Build(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(b, *got); diff != "" {
			t.Error(diff)
		}
		return b
	}
	run := write(func(b *store.Build) {})
	for range 100 {
		write(func(b *store.Build) { b.Reused, b.Status = true, store.StatusBuilt })
	}
	write(func(b *store.Build) { b.Created = created.Add(2 * time.Hour) }) // another month
	run.Status, run.CPUSeconds, run.LimitSeconds = store.StatusBuilt, 7, 9
	run.Started, run.Stopped = created, created.Add(time.Minute)
	if err := s.EndBuild(ctx, []*store.Build{&run}); err != nil {
		t.Fatal(err)
	}
	want := store.Usage{Builds: 1, Succeeded: 1, Reused: 100, Wall: time.Minute, CPUSeconds: 7, LimitSeconds: 9}
	check := func() {
		t.Helper()
		if got, err := s.Usage(ctx, alice, created); err != nil || got != want {
			t.Errorf("usage %+v, want %+v, %v", got, want, err)
		}
		for reused, n := range map[bool]int{false: 2, true: 102} {
			if list, err := s.Builds(ctx, alice, store.BuildFilter{Reused: reused}); err != nil || len(list) != n {
				t.Errorf("%d builds, want %d, %v", len(list), n, err)
			}
		}
	}
	check()
	crashed := t.TempDir()
	if err := os.CopyFS(crashed, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = storetest.OpenDir(t, dir, store.Config{})
	if id, err := s.ReserveBuild(ctx); err != nil || id != last+1 {
		t.Errorf("after a stop in order: id %d after %d, %v", id, last, err)
	}
	check()
	s = storetest.OpenDir(t, crashed, store.Config{})
	check()
	write(func(b *store.Build) {})
}

// TestBuildLog has readers follow a log from different moments on.
func TestBuildLog(t *testing.T) {
	s := storetest.Open(t)
	l, err := s.CreateBuildLog(ctx, 7)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.CreateBuildLog(ctx, 7); !errors.Is(err, store.ErrExists) {
		t.Errorf("second log: %v", err)
	}
	var want bytes.Buffer
	var wg sync.WaitGroup
	got := make([][]byte, 5)
	for i := range got {
		r, err := s.OpenBuildLog(ctx, 7)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			defer r.Close()
			var err error
			if got[i], err = io.ReadAll(r); err != nil {
				t.Error(err)
			}
		})
		for j := range 1000 {
			fmt.Fprintf(&want, "%d %d \x00\xff\r\n", i, j)
			if _, err := fmt.Fprintf(l, "%d %d \x00\xff\r\n", i, j); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	r, err := s.OpenBuildLog(ctx, 7)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	after, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	for i, b := range append(got, after) {
		if !bytes.Equal(b, want.Bytes()) {
			t.Errorf("reader %d got %d bytes of %d, or others", i, len(b), want.Len())
		}
	}
	if _, err := s.CreateBuildLog(ctx, 7); !errors.Is(err, store.ErrExists) {
		t.Errorf("second log: %v", err)
	}
	if _, err := s.OpenBuildLog(ctx, 8); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("log of build 8: %v", err)
	}
}

// TestBuildLogCancelled has a reader that waits give up.
func TestBuildLogCancelled(t *testing.T) {
	s := storetest.Open(t)
	l, err := s.CreateBuildLog(ctx, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cancelled, cancel := context.WithCancel(ctx)
	r, err := s.OpenBuildLog(cancelled, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cancel()
	if n, err := r.Read(make([]byte, 10)); n != 0 || !errors.Is(err, context.Canceled) {
		t.Errorf("%d, %v", n, err)
	}
}

// TestBuildLogLeavesRoom: a builder that prints for ever does not fill the disk.
func TestBuildLogLeavesRoom(t *testing.T) {
	s := storetest.OpenDir(t, t.TempDir(), store.Config{MinFree: 1 << 60})
	l, err := s.CreateBuildLog(ctx, 1)
	if err != nil {
		t.Fatal(err)
	}
	line, n := bytes.Repeat([]byte("y\n"), 32<<10), 0
	for err == nil && n < 16<<20 {
		var k int
		k, err = l.Write(line)
		n += k
	}
	if !errors.Is(err, store.ErrNoSpace) || n == 0 {
		t.Errorf("after %d bytes: %v", n, err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := s.OpenBuildLog(ctx, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || len(got) != n {
		t.Errorf("the log has %d bytes of %d, %v", len(got), n, err)
	}
}
