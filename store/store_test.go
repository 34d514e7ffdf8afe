package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"nbd/nixproto"
	"nbd/store"
	"nbd/store/storetest"
)

func TestAccounts(t *testing.T) {
	dir := t.TempDir()
	s := storetest.OpenDir(t, dir, store.Config{ServerName: "builder.example.org"})
	alice, err := s.AddAccount(ctx, "alice", storetest.Key("a1"), storetest.Key("a2"))
	if err != nil {
		t.Fatal(err)
	}
	if alice.ID != 1 || !strings.HasPrefix(alice.PublicKey, "builder.example.org/alice-1:") {
		t.Errorf("%+v", alice)
	}
	key, err := s.SigningKey(ctx, alice.ID)
	if err != nil || key.Public().String() != alice.PublicKey {
		t.Errorf("signing key %v, %v", key, err)
	}
	for _, name := range []string{"", "Alice", "-x", "a/b", "a b", "a:b", strings.Repeat("x", 65), "ä"} {
		if _, err := s.AddAccount(ctx, name); !errors.Is(err, store.ErrInvalid) {
			t.Errorf("account %q: %v", name, err)
		}
	}
	if _, err := s.AddAccount(ctx, "alice"); !errors.Is(err, store.ErrExists) {
		t.Errorf("second alice: %v", err)
	}
	if _, err := s.AddAccount(ctx, "mallory", storetest.Key("a1")); !errors.Is(err, store.ErrExists) {
		t.Errorf("alice's key: %v", err)
	}
	if _, err := s.AccountByName(ctx, "mallory"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("mallory is there: %v", err)
	}
	if err := s.RemoveAccount(ctx, alice.ID); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.AccountByKey(ctx, storetest.Key("a1").Wire); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("key of a removed account: %v", err)
	}
	for what, err := range map[string]error{
		"signing key": second(s.SigningKey(ctx, alice.ID)),
		"by id":       second(s.AccountByID(ctx, alice.ID)),
		"by name":     second(s.AccountByName(ctx, "alice")),
		"all":         second(s.All(ctx, alice.ID)),
		"upload":      second(s.NewUpload(ctx, alice.ID, store.UploadOptions{})),
		"register":    s.Register(ctx, alice.ID, nil),
		"remove":      s.RemoveAccount(ctx, alice.ID),
		"log":         s.PutLog(ctx, alice.ID, drvBase, strings.NewReader("")),
		"key":         second(s.AddKey(ctx, alice.ID, storetest.Key("a3"))),
	} {
		if !errors.Is(err, store.ErrNotFound) {
			t.Errorf("%s of a removed account: %v", what, err)
		}
	}
	if _, err := s.AddAccount(ctx, "alice"); !errors.Is(err, store.ErrExists) {
		t.Errorf("alice again: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = storetest.OpenDir(t, dir, store.Config{})
	bob, err := s.AddAccount(ctx, "bob", storetest.Key("a1"))
	if err != nil || bob.ID == alice.ID {
		t.Errorf("%+v, %v", bob, err)
	}
	all, err := s.Accounts(ctx)
	if diff := cmp.Diff([]store.Account{bob}, all); diff != "" || err != nil {
		t.Error(diff, err)
	}
}

// second returns the error of a call.
func second[T any](_ T, err error) error { return err }

func TestKeys(t *testing.T) {
	s := storetest.Open(t)
	alice, bob := storetest.Account(t, s, "alice"), storetest.Account(t, s, "bob")
	ci := storetest.Key("ci")
	ci.Permissions = []string{"build:write"}
	k, err := s.AddKey(ctx, alice, ci)
	if err != nil || k.Type != "ssh-ed25519" || !strings.HasPrefix(k.Fingerprint, "SHA256:") || k.Added.IsZero() {
		t.Errorf("%+v, %v", k, err)
	}
	a, got, err := s.AccountByKey(ctx, ci.Wire)
	if err != nil || a.ID != alice {
		t.Errorf("%+v, %v", a, err)
	}
	if diff := cmp.Diff(k, got, cmpopts.EquateApproxTime(time.Second)); diff != "" {
		t.Error(diff)
	}
	if _, err := s.AddKey(ctx, bob, ci); !errors.Is(err, store.ErrExists) {
		t.Errorf("alice's key for bob: %v", err)
	}
	bad := storetest.Key("bad")
	bad.Permissions = []string{"root"}
	if _, err := s.AddKey(ctx, bob, bad); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("unknown permission: %v", err)
	}
	if _, err := s.AddKey(ctx, bob, store.Key{Wire: []byte("rubbish")}); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("rubbish: %v", err)
	}
	keys, err := s.Keys(ctx, alice)
	if err != nil || len(keys) != 2 || len(keys[0].Permissions) != len(store.Permissions()) || keys[1].Comment != "ci" {
		t.Errorf("%+v, %v", keys, err)
	}
	if owner, err := s.RemoveKey(ctx, k.Fingerprint); err != nil || owner != alice {
		t.Errorf("%d, %v", owner, err)
	}
	for _, print := range []string{k.Fingerprint, "", "SHA256:", "SHA256:x!"} {
		if _, err := s.RemoveKey(ctx, print); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("remove %q: %v", print, err)
		}
	}
}

const drvBase = "00000000000000000000000000000000-x.drv"

func TestUploadedLogs(t *testing.T) {
	s := storetest.Open(t)
	alice, bob := storetest.Account(t, s, "alice"), storetest.Account(t, s, "bob")
	log := bytes.Repeat([]byte("line\x00\xff\n"), 100000)
	for range 2 {
		if err := s.PutLog(ctx, alice, drvBase, bytes.NewReader(log)); err != nil {
			t.Fatal(err)
		}
	}
	r, err := s.Log(ctx, alice, drvBase)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, log) {
		t.Errorf("%d bytes of %d, %v", len(got), len(log), err)
	}
	if _, err := s.Log(ctx, bob, drvBase); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("bob: %v", err)
	}
	for _, name := range []string{"", "..", "../../nbd.db", "00000000000000000000000000000000-x", "00000000000000000000000000000000-../x.drv"} {
		if err := s.PutLog(ctx, alice, name, bytes.NewReader(log)); !errors.Is(err, store.ErrInvalid) {
			t.Errorf("log of %q: %v", name, err)
		}
	}
	broken := errors.New("connection lost")
	if err := s.PutLog(ctx, bob, drvBase, io.MultiReader(strings.NewReader("x"), errReader{broken})); !errors.Is(err, broken) {
		t.Errorf("broken upload: %v", err)
	}
	if _, err := s.Log(ctx, bob, drvBase); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("half a log: %v", err)
	}
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

func TestRealisations(t *testing.T) {
	s := storetest.Open(t)
	alice, bob := storetest.Account(t, s, "alice"), storetest.Account(t, s, "bob")
	out := storetest.Fill(t, s, alice, 1)[0].Path
	r := &nixproto.Realisation{
		DrvHash: nixproto.SumSHA256([]byte("drv")), OutputName: "out", OutPath: out, Signatures: []string{"k:AAAA"},
		Dependent: map[string]string{"sha256:" + strings.Repeat("0", 64) + "!dev": out.Base()},
	}
	if err := s.AddRealisation(ctx, bob, r); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("bob does not have the output: %v", err)
	}
	if err := s.AddRealisation(ctx, alice, r); err != nil {
		t.Fatal(err)
	}
	got, err := s.Realisation(ctx, alice, r.DrvHash, "out")
	if err != nil {
		t.Fatal(err)
	}
	if string(got.JSON()) != string(r.JSON()) {
		t.Errorf("got %s, want %s", got.JSON(), r.JSON())
	}
	for _, a := range []store.AccountID{alice, bob} {
		if _, err := s.Realisation(ctx, a, r.DrvHash, "dev"); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("another output, account %d: %v", a, err)
		}
	}
	if _, err := s.Delete(ctx, alice, out); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Realisation(ctx, alice, r.DrvHash, "out"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("its output is deleted: %v", err)
	}
}

// TestDerivation uploads a derivation without its content address, and finds it
// by its output.
func TestDerivation(t *testing.T) {
	s := storetest.Open(t)
	a := storetest.Account(t, s, "alice")
	out := storetest.Unsigned("out", "d", nil).Path
	drv := &nixproto.Derivation{
		Name: "d", System: "x86_64-linux", Builder: "/bin/sh", Env: map[string]string{"out": string(out)},
		Outputs: map[string]nixproto.DerivationOutput{"out": {Path: out}},
	}
	p, err := drv.DrvPath()
	if err != nil {
		t.Fatal(err)
	}
	nar := storetest.File(string(drv.ATerm()), false)
	info := &nixproto.PathInfo{Path: p, NarHash: nixproto.SumSHA256(nar), NarSize: uint64(len(nar))}
	storetest.Add(t, s, a, info, nar)
	got, err := s.Info(ctx, a, p)
	if err != nil || !strings.HasPrefix(got.CA, "text:sha256:") {
		t.Errorf("%+v, %v", got, err)
	}
	for range 2 {
		derivers, err := s.ValidDerivers(ctx, a, out)
		if diff := cmp.Diff([]nixproto.StorePath{p}, derivers); diff != "" || err != nil {
			t.Error(diff, err)
		}
		// It stays after a repair, too.
		u, err := s.NewUpload(ctx, a, store.UploadOptions{Repair: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := u.Add(info, bytes.NewReader(nar)); err != nil {
			t.Fatal(err)
		}
		if err := u.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Delete(ctx, a, p); err != nil {
		t.Fatal(err)
	}
	if derivers, err := s.ValidDerivers(ctx, a, out); err != nil || len(derivers) > 0 {
		t.Errorf("%v, %v", derivers, err)
	}
	wrong := storetest.Unsigned("other", "d.drv", nar)
	u, err := s.NewUpload(ctx, a, store.UploadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Abort()
	if err := u.Add(wrong, bytes.NewReader(nar)); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("a derivation at a path that is not its own: %v", err)
	}
}

func TestRegister(t *testing.T) {
	s := storetest.Open(t)
	a := storetest.Account(t, s, "alice")
	stage := func(nar []byte) *store.Staged {
		st, err := s.Stage(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for len(nar) > 0 {
			n := min(len(nar), 1000)
			if _, err := st.Write(nar[:n]); err != nil {
				t.Fatal(err)
			}
			nar = nar[n:]
		}
		if err := st.Finish(); err != nil {
			t.Fatal(err)
		}
		return st
	}
	one, two := storetest.File("one", false), big(1, 300<<10)
	p, q := storetest.Unsigned("p", "p", one), storetest.Unsigned("q", "q", two)
	p.References = []nixproto.StorePath{p.Path, q.Path}
	cycle := *q
	cycle.References = p.References[:1]
	err := s.Register(ctx, a, []store.Registration{{*p, stage(one)}, {cycle, stage(two)}})
	if !errors.Is(err, store.ErrInvalid) {
		t.Errorf("cycle: %v", err)
	}
	if err := s.Register(ctx, a, []store.Registration{{*p, stage(one)}}); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("missing reference: %v", err)
	}
	if all, err := s.All(ctx, a); err != nil || len(all) > 0 {
		t.Errorf("%v, %v", all, err)
	}
	if err := s.Register(ctx, a, []store.Registration{{*p, stage(one)}, {*q, stage(two)}}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(content(t, s, a, q.Path), two) {
		t.Error("content is another")
	}
	other := storetest.Unsigned("o", "o", nil)
	other.NarSize = 1
	if err := s.Register(ctx, a, []store.Registration{{Info: *other}}); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("blob that is not stored: %v", err)
	}
	st, err := s.Stage(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := st.Write(append(bytes.Clone(one), 0)); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("bytes behind the NAR: %v", err)
	}
	st.Discard()
}

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
