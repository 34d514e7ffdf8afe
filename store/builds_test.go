package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
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
			if err := s.PutBuild(ctx, &b); err != nil {
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
	stolen := builds[4]
	stolen.Account = alice
	if err := s.PutBuild(ctx, &stolen); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("bob's build: %v", err)
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

func TestResults(t *testing.T) {
	s := storetest.Open(t)
	key := [32]byte{1}
	if _, ok, err := s.Result(ctx, key); ok || err != nil {
		t.Errorf("%v, %v", ok, err)
	}
	first := &store.Result{Build: 1, Account: 1, Outputs: map[string]store.ResultOutput{
		"out": {Path: storetest.Unsigned("x", "x", nil).Path, NarHash: nixproto.SumSHA256(nil), NarSize: 7},
	}}
	if ok, err := s.PutResult(ctx, key, first); !ok || err != nil {
		t.Errorf("%v, %v", ok, err)
	}
	if ok, err := s.PutResult(ctx, key, &store.Result{Build: 2}); ok || err != nil {
		t.Errorf("%v, %v", ok, err)
	}
	got, ok, err := s.Result(ctx, key)
	if !ok || err != nil || got.Build != 1 || !maps.EqualFunc(got.Outputs, first.Outputs, func(a, b store.ResultOutput) bool { return a.Path == b.Path && a.NarHash == b.NarHash }) {
		t.Errorf("%+v, %v, %v", got, ok, err)
	}
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
