package server

import (
	"crypto/rand"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	gossh "golang.org/x/crypto/ssh"

	"nbd/nixproto"
	"nbd/store"
)

// set stores settings of an account; an empty value removes one.
func (ts *testServer) set(a store.Account, settings ...string) {
	ts.t.Helper()
	err := ts.store.ChangeSettings(ts.t.Context(), []store.SettingsOwner{{Account: a.ID}}, func(values []map[string]string) error {
		for i := 0; i < len(settings); i += 2 {
			if values[0][settings[i]] = settings[i+1]; settings[i+1] == "" {
				delete(values[0], settings[i])
			}
		}
		return nil
	})
	if err != nil {
		ts.t.Fatal(err)
	}
}

func testSigningKey(t *testing.T, name string) nixproto.SigningKey {
	t.Helper()
	k, err := nixproto.GenerateSigningKey(name, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// Trust follows the settings of all accounts, and takes both sides.
func TestTrust(t *testing.T) {
	ts := newTestServer(t, nil)
	alice := ts.account
	bob, carol := ts.addAccount("bob", newKey(t), nil), ts.addAccount("carol", newKey(t), nil)
	one, other := testSigningKey(t, "one-1").Public(), testSigningKey(t, "one-1").Public()
	own, err := nixproto.ParsePublicKey(alice.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	keys := []nixproto.PublicKey{one, own}
	want := func(what string, a store.Account, linked []store.AccountID, offers ...store.Offer) {
		t.Helper()
		got := ts.trusts.trust(a.ID, keys)
		if !slices.Equal(got.Linked, linked) || !slices.EqualFunc(got.Offers, offers, func(x, y store.Offer) bool {
			return x.Account == y.Account && slices.Equal(x.Keys, y.Keys)
		}) {
			t.Errorf("%s: %+v", what, got)
		}
	}
	want("nobody said anything", bob, nil)
	ts.set(bob, "trusted-accounts", "alice,bob,nobody")
	want("one side", bob, nil)
	want("the other side", alice, nil)
	ts.set(alice, "trusted-accounts", "carol,bob")
	want("both", bob, []store.AccountID{alice.ID})
	want("both", alice, []store.AccountID{bob.ID})
	want("a third one", carol, nil)
	ts.set(alice, "offer-signed", "one-1")
	want("a name of a key", carol, nil, store.Offer{Account: alice.ID, Keys: []nixproto.PublicKey{one}})
	want("who offers", alice, []store.AccountID{bob.ID})
	ts.set(alice, "offer-signed", other.String()+","+own.Name)
	want("whole keys", carol, nil, store.Offer{Account: alice.ID, Keys: []nixproto.PublicKey{own}})
	ts.set(carol, "offer-signed", one.String())
	want("two offer", bob, []store.AccountID{alice.ID},
		store.Offer{Account: alice.ID, Keys: []nixproto.PublicKey{own}}, store.Offer{Account: carol.ID, Keys: []nixproto.PublicKey{one}})
	ts.set(alice, "trusted-accounts", "")
	want("unlinked", bob, nil,
		store.Offer{Account: alice.ID, Keys: []nixproto.PublicKey{own}}, store.Offer{Account: carol.ID, Keys: []nixproto.PublicKey{one}})
	ts.set(alice, "trusted-accounts", "bob")
	if err := ts.store.RemoveAccount(t.Context(), alice.ID); err != nil {
		t.Fatal(err)
	}
	want("removed", bob, nil, store.Offer{Account: carol.ID, Keys: []nixproto.PublicKey{one}})
}

// Every operation that asks about a path sees what is lent, and nothing else.
func TestLentOverTheWire(t *testing.T) {
	ts := newTestServer(t, nil)
	bobKey := newKey(t)
	bob := ts.addAccount("bob", bobKey, nil)
	dep := builtPath(t, "dep", "dep")
	top := builtPath(t, "top", "top", dep.Path)
	ts.upload(ts.account.ID, dep, top)
	real := nixproto.Realisation{DrvHash: nixproto.SumSHA256([]byte("drv")), OutputName: "out", OutPath: top.Path}
	if err := ts.store.AddRealisation(t.Context(), ts.account.ID, &real); err != nil {
		t.Fatal(err)
	}
	check := func(key gossh.Signer, seen bool) {
		t.Helper()
		w := ts.worker(key)
		if w.isValid(t, top.Path) != seen {
			t.Errorf("valid: %v", !seen)
		}
		if got := *w.do(t, &nixproto.QueryValidPaths{Paths: []nixproto.StorePath{dep.Path, top.Path}}, nil).(*nixproto.PathSet); len(got) == 2 != seen {
			t.Errorf("valid paths: %q", got)
		}
		if got := w.do(t, &nixproto.QueryPathInfo{Path: top.Path}, nil).(*nixproto.OptionalPathInfo); got.Info != nil != seen {
			t.Errorf("info: %+v", got.Info)
		}
		if got := *w.do(t, &nixproto.QueryPathFromHashPart{HashPart: top.Path.HashPart()}, nil).(*nixproto.OptionalPath); got != "" != seen {
			t.Errorf("from hash part: %q", got)
		}
		if got := *w.do(t, &nixproto.QueryRealisation{DrvHash: real.DrvHash, OutputName: "out"}, nil).(*nixproto.RealisationSet); len(got) == 1 != seen {
			t.Errorf("realisation: %v", got)
		}
		if got := *w.do(t, &nixproto.QueryAllValidPaths{}, nil).(*nixproto.PathSet); len(got) != 0 {
			t.Errorf("the own view has %q", got)
		}
		ask := func(req nixproto.Request) {
			t.Helper()
			if seen {
				w.do(t, req, nil)
			} else if msg := w.refused(t, req, nil); !strings.Contains(msg, "is not valid") {
				t.Errorf("%s: %q", req.Op(), msg)
			}
		}
		ask(&nixproto.EnsurePath{Path: top.Path})
		ask(&nixproto.QueryReferrers{Path: dep.Path})
		// What is lent is not the borrower's to change.
		sig := testSigningKey(t, "k-1").Sign(top.Fingerprint())
		if msg := w.refused(t, &nixproto.AddSignatures{Path: top.Path, Signatures: []string{sig}}, nil); !strings.Contains(msg, "is not valid") {
			t.Errorf("sign: %q", msg)
		}
		w.refused(t, &nixproto.CollectGarbage{Action: nixproto.GCDeleteSpecific, Paths: []nixproto.StorePath{top.Path}}, nil)
		if seen {
			checkPath(t, w, top)
		}
		s, p := ts.serveClient(key)
		defer p.Close()
		infos := *serveDo(t, s, &nixproto.ServeQueryPathInfos{Paths: []nixproto.StorePath{top.Path}}, nil).(*nixproto.ServePathInfos)
		if len(infos) == 1 != seen {
			t.Errorf("serve: infos %v", infos)
		}
	}
	check(bobKey, false)
	ts.set(bob, "trusted-accounts", "alice")
	check(bobKey, false)
	ts.set(ts.account, "trusted-accounts", "bob")
	check(bobKey, true)

	// What bob adds on top takes what it needs into his own view.
	w := ts.worker(bobKey)
	mine := builtPath(t, "mine", "mine", top.Path)
	w.do(t, &nixproto.AddMultipleToStore{}, burst(mine))
	ts.set(ts.account, "trusted-accounts", "")
	w = ts.worker(bobKey)
	checkPath(t, w, mine)
	checkPath(t, w, dep)
	if all, err := ts.store.All(t.Context(), bob.ID); err != nil || len(all) != 3 {
		t.Errorf("bob's view: %q, %v", all, err)
	}
}

// A signature in the name of a key that the account trusts has to be one.
func TestForgedSignatureOfTrustedKey(t *testing.T) {
	ts := newTestServer(t, nil)
	key := testSigningKey(t, "friend-1")
	p := builtPath(t, "signed", "x")
	p.Signatures = []string{key.Sign("something else")}
	ts.worker(ts.alice).do(t, &nixproto.AddMultipleToStore{}, burst(p))
	q := builtPath(t, "signed-2", "x")
	q.Signatures = []string{key.Sign("something else")}
	ts.set(ts.account, "trusted-public-keys", key.Public().String())
	w := ts.worker(ts.alice)
	if msg := w.refused(t, &nixproto.AddMultipleToStore{}, burst(q)); !strings.Contains(msg, "friend-1") {
		t.Errorf("forged: %q", msg)
	}
	w = ts.worker(ts.alice)
	if msg := w.refused(t, &nixproto.AddSignatures{Path: p.Path, Signatures: p.Signatures}, nil); !strings.Contains(msg, "friend-1") {
		t.Errorf("added: %q", msg)
	}
	bad := nixproto.Realisation{DrvHash: nixproto.SumSHA256([]byte("drv")), OutputName: "out", OutPath: p.Path, Signatures: p.Signatures}
	w = ts.worker(ts.alice)
	if msg := w.refused(t, &nixproto.RegisterDrvOutput{Realisation: bad}, nil); !strings.Contains(msg, "friend-1") {
		t.Errorf("realisation: %q", msg)
	}
	if _, err := ts.store.Realisation(t.Context(), ts.account.ID, bad.DrvHash, "out"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("realisation: %v", err)
	}
}

// Thousands of accounts cost a session nothing but what concerns it.
func BenchmarkTrust(b *testing.B) {
	st, err := store.Open(b.TempDir(), store.Config{MinFree: -1})
	if err != nil {
		b.Fatal(err)
	}
	defer st.Close()
	var ids []store.AccountID
	for i := range 200 {
		a, err := st.AddAccount(b.Context(), "account-"+string(rune('a'+i/26))+string(rune('a'+i%26)))
		if err != nil {
			b.Fatal(err)
		}
		ids = append(ids, a.ID)
	}
	t := &trusts{book: newSettingsBook(nil, st, slog.New(slog.DiscardHandler))}
	b.ResetTimer()
	for i := range b.N {
		if got := t.trust(ids[i%len(ids)], nil); len(got.Linked) != 0 {
			b.Fatal(cmp.Diff(store.Trust{}, got))
		}
	}
}
