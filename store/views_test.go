package store_test

import (
	"bytes"
	"errors"
	"io"
	"strings"
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
		st, err := s.Stage(ctx, a)
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
	st, err := s.Stage(ctx, a)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := st.Write(append(bytes.Clone(one), 0)); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("bytes behind the NAR: %v", err)
	}
	st.Discard()
}
