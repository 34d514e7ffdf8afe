package store_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nbd/nixproto"
	"nbd/store"
	"nbd/store/storetest"
)

// TestOpenBlobStays reads blobs that were deleted and swept.
func TestOpenBlobStays(t *testing.T) {
	s := storetest.Open(t)
	a := storetest.Account(t, s, "alice")
	for _, nar := range [][]byte{storetest.File("small", false), big(1, 300<<10)} {
		info := storetest.Source("x", nar)
		storetest.Add(t, s, a, info, nar)
		blob, err := s.OpenBlob(ctx, info.NarHash)
		if err != nil {
			t.Fatal(err)
		}
		defer blob.Close()
		if res, err := s.Delete(ctx, a, info.Path); err != nil || res.Freed != info.NarSize {
			t.Fatalf("%+v, %v", res, err)
		}
		fillSegment(t, s, a)
		if _, err := s.GC(ctx, a, store.GCOptions{}); err != nil {
			t.Fatal(err)
		}
		if freed, err := s.Sweep(ctx); err != nil || freed == 0 {
			t.Errorf("swept %d bytes, %v", freed, err)
		}
		if _, err := s.OpenBlob(ctx, info.NarHash); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("opens after the sweep: %v", err)
		}
		got := make([]byte, len(nar))
		if _, err := blob.ReadAt(got, 0); err != nil || !bytes.Equal(got, nar) {
			t.Errorf("an open blob has other content: %v", err)
		}
		if _, err := blob.ReadAt(make([]byte, 2), blob.Size()-1); err != io.EOF {
			t.Errorf("read across the end: %v", err)
		}
	}
}

// fillSegment uploads so much that the last segment is not the last one any
// more.
func fillSegment(t *testing.T, s *store.Store, a store.AccountID) {
	t.Helper()
	u, err := s.NewUpload(ctx, a, store.UploadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 1150 {
		nar := big(uint64(1000+i), 60<<10)
		if err := u.Add(storetest.Source("filler", nar), bytes.NewReader(nar)); err != nil {
			t.Fatal(err)
		}
	}
	if err := u.Commit(); err != nil {
		t.Fatal(err)
	}
}

// TestCompaction keeps what little is in use of segments that are given up.
func TestCompaction(t *testing.T) {
	dir := t.TempDir()
	s := storetest.OpenDir(t, dir, store.Config{})
	a := storetest.Account(t, s, "alice")
	lease := s.NewLease(a)
	defer lease.Release()
	kept := make(map[nixproto.StorePath][]byte)
	u, err := s.NewUpload(ctx, a, store.UploadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2200 {
		nar := big(uint64(i), 60<<10)
		info := storetest.Unsigned(fmt.Sprint(i), "x", nar)
		if err := u.Add(info, bytes.NewReader(nar)); err != nil {
			t.Fatal(err)
		}
		if i%100 == 0 {
			kept[info.Path] = nar
			lease.Add(info.Path)
		}
	}
	if err := u.Commit(); err != nil {
		t.Fatal(err)
	}
	before := len(files(t, dir+"/segments"))
	if _, err := s.GC(ctx, a, store.GCOptions{}); err != nil {
		t.Fatal(err)
	}
	freed, err := s.Sweep(ctx)
	if after := len(files(t, dir+"/segments")); err != nil || freed < 100<<20 || before < 3 || after > 1 {
		t.Errorf("freed %d bytes, %d segments became %d, %v", freed, before, after, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = storetest.OpenDir(t, dir, store.Config{})
	for p, nar := range kept {
		if !bytes.Equal(content(t, s, a, p), nar) {
			t.Errorf("%s has other content", p)
		}
	}
	storetest.Check(t, s)
}

// TestSweepRace has some upload and delete the same few contents while others
// sweep: what was acknowledged is there until it is deleted.
func TestSweepRace(t *testing.T) {
	s := storetest.Open(t)
	var nars [][]byte
	for i := range 6 {
		nars = append(nars, big(uint64(i), 1000+i%2*(100<<10)))
	}
	stop := time.Now().Add(2 * time.Second)
	var wg sync.WaitGroup
	for w := range 4 {
		a := storetest.Account(t, s, fmt.Sprintf("account-%d", w))
		wg.Go(func() {
			for i := 0; time.Now().Before(stop); i++ {
				nar := nars[(i*(w+1))%len(nars)]
				info := storetest.Source("x", nar)
				storetest.Add(t, s, a, info, nar)
				if got := content(t, s, a, info.Path); !bytes.Equal(got, nar) {
					t.Error("content is another")
				}
				if _, err := s.Delete(ctx, a, info.Path); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Go(func() {
		for time.Now().Before(stop) {
			if _, err := s.Sweep(ctx); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
}

func TestGC(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	s := storetest.OpenDir(t, t.TempDir(), store.Config{Now: func() time.Time { return now }})
	a := storetest.Account(t, s, "alice")
	infos := storetest.Fill(t, s, a, 20)
	now = now.Add(time.Hour)
	nar := storetest.File("young", false)
	young := storetest.Source("young", nar, infos[3].Path)
	storetest.Add(t, s, a, young, nar)
	live, err := s.GC(ctx, a, store.GCOptions{Live: true, OlderThan: 30 * time.Minute})
	if err != nil || len(live.Paths) != 5 || live.Freed != 0 {
		t.Errorf("live %+v, %v", live, err)
	}
	dry, err := s.GC(ctx, a, store.GCOptions{DryRun: true, OlderThan: 30 * time.Minute})
	if err != nil || len(dry.Paths) != 16 {
		t.Errorf("dead %+v, %v", dry, err)
	}
	some, err := s.GC(ctx, a, store.GCOptions{MaxFreed: 1, OlderThan: 30 * time.Minute})
	if diff := cmp.Diff([]nixproto.StorePath{infos[19].Path}, some.Paths); diff != "" || err != nil {
		t.Error(diff, err)
	}
	if _, err := s.GC(ctx, a, store.GCOptions{OlderThan: 30 * time.Minute}); err != nil {
		t.Fatal(err)
	}
	if all, err := s.All(ctx, a); err != nil || len(all) != 5 {
		t.Errorf("%d left, %v", len(all), err)
	}
	storetest.Check(t, s)
}
