package server

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"nbd/nixproto"
	"nbd/store"
)

// What an account tries, with a client of its own, to get at what another one
// has in the store. In these tests mallory is the attacker, alice the victim.

// An attack is a server with an attacker.
type attack struct {
	*testServer
	mallory store.Account
	worker  func() *workerClient // opens a session of mallory's
}

func newAttack(t *testing.T, change func(*Config)) *attack {
	t.Helper()
	ts := newTestServer(t, change)
	key := newKey(t)
	a := &attack{testServer: ts, mallory: ts.addAccount("mallory", key, nil)}
	a.worker = func() *workerClient { return ts.worker(key) }
	return a
}

// gotNothing fails the test if mallory can see one of paths in any way.
func (a *attack) gotNothing(t *testing.T, paths ...testPath) {
	t.Helper()
	w := a.worker()
	for _, p := range paths {
		absent := nixproto.StorePath(strings.Replace(string(p.Path), p.Path.HashPart(), strings.Repeat("0", nixproto.HashPartLen), 1))
		ask := func(path nixproto.StorePath) string {
			var answers []string
			for _, req := range []nixproto.Request{
				&nixproto.IsValidPath{Path: path}, &nixproto.QueryValidPaths{Paths: []nixproto.StorePath{path}, Substitute: true},
				&nixproto.QueryPathInfo{Path: path}, &nixproto.QueryPathFromHashPart{HashPart: path.HashPart()},
				&nixproto.QueryReferrers{Path: path}, &nixproto.QueryValidDerivers{Path: path}, &nixproto.QueryDeriver{Path: path},
				&nixproto.EnsurePath{Path: path}, &nixproto.AddTempRoot{Path: path}, &nixproto.NarFromPath{Path: path},
				&nixproto.QueryAllValidPaths{}, &nixproto.AddSignatures{Path: path, Signatures: []string{testSigningKey(t, "m").Sign("")[:2] + "AAAA"}},
				&nixproto.CollectGarbage{Action: nixproto.GCDeleteSpecific, Paths: []nixproto.StorePath{path}},
				&nixproto.QueryMissing{Paths: []nixproto.DerivedPath{{Path: path}}},
			} {
				resp, err := w.Do(req, nil)
				if err != nil {
					w = a.worker() // some errors end a session
				}
				text, jsonErr := json.Marshal(resp)
				if jsonErr != nil {
					t.Fatal(jsonErr)
				}
				answers = append(answers, fmt.Sprintf("%s: %s %v", req.Op(), text, err))
			}
			return strings.ReplaceAll(fmt.Sprint(answers), string(path), "PATH")
		}
		mine, none := ask(p.Path), ask(absent)
		if mine != none {
			t.Errorf("what alice has is answered by\n%s\nand what nobody has by\n%s", mine, none)
		}
	}
}

// A public key opens nothing by itself, nor does the word of one side.
func TestAttackPublicKeyWithoutOffer(t *testing.T) {
	a := newAttack(t, nil)
	own := a.account.PublicKey
	signing, err := a.store.SigningKey(t.Context(), a.account.ID)
	if err != nil {
		t.Fatal(err)
	}
	p := builtPath(t, "secret", "alice's")
	p.Sign(signing)
	a.upload(a.account.ID, p)
	name, _, _ := strings.Cut(own, ":")
	for _, settings := range [][]string{
		{"trusted-public-keys", own}, {"offer-signed", own}, {"offer-signed", name}, {"trusted-accounts", "alice"},
		{"share-results", "true"}, {"public-cache", "true"},
	} {
		a.set(a.mallory, settings...)
		a.gotNothing(t, p)
	}
	// Nor does a path of one's own that refers to it, or claims to be it.
	w := a.worker()
	on := builtPath(t, "on-top", "x", p.Path)
	if msg := w.refused(t, &nixproto.AddMultipleToStore{}, burst(on)); !strings.Contains(msg, "is not valid") {
		t.Errorf("reference: %q", msg)
	}
	a.gotNothing(t, p)
}

// A link that ended gives nothing more, also to a session that goes on.
func TestAttackUnlinkedSession(t *testing.T) {
	a := newAttack(t, nil)
	a.set(a.mallory, "trusted-accounts", "alice")
	a.set(a.account, "trusted-accounts", "mallory")
	before := builtPath(t, "before", "x")
	a.upload(a.account.ID, before)
	w := a.worker()
	if !w.isValid(t, before.Path) {
		t.Fatal("linked, and not seen")
	}
	a.set(a.account, "trusted-accounts", "")
	after, other := builtPath(t, "after", "x"), builtPath(t, "other", "x")
	a.upload(a.account.ID, after, other)
	if w.isValid(t, after.Path) {
		t.Error("a session of before sees what alice brought after she ended the link")
	}
	if !w.isValid(t, before.Path) {
		t.Error("what was chosen is not kept")
	}
	a.gotNothing(t, before, after, other)
}

// A claimed hash stands for no bytes, whatever protocol it comes by.
func TestAttackClaimedHash(t *testing.T) {
	a := newAttack(t, nil)
	small := builtPath(t, "secret", "alice's")
	large := builtPath(t, "large", strings.Repeat("alice's", 20_000))
	a.upload(a.account.ID, small, large)
	for _, p := range []testPath{small, large} {
		other := testPath{p.PathInfo, slices.Clone(p.nar)}
		other.nar[len(other.nar)-30] ^= 1 // in the padding or content
		short := testPath{p.PathInfo, p.nar[:len(p.nar)-8]}
		long := testPath{p.PathInfo, p.nar}
		long.NarSize -= 8
		for _, lie := range []testPath{other, short, long, {p.PathInfo, nil}} {
			info := lie.PathInfo
			if resp, err := a.worker().Do(&nixproto.AddMultipleToStore{}, burst(lie)); err == nil {
				t.Errorf("burst: %+v", resp)
			}
			if resp, err := a.worker().Do(&nixproto.AddToStoreNar{Info: info}, raw(lie.nar)); err == nil {
				t.Errorf("NAR: %+v", resp)
			}
		}
	}
	a.gotNothing(t, small, large)
	if all, err := a.store.All(t.Context(), a.mallory.ID); err != nil || len(all) != 0 {
		t.Errorf("mallory has %v, %v", all, err)
	}
}

// References that content does not have, or lacks, are mallory's alone.
func TestAttackForgedEdges(t *testing.T) {
	a := newAttack(t, nil)
	dep := builtPath(t, "dep", "dep")
	top := builtPath(t, "top", "uses "+string(dep.Path), dep.Path)
	a.upload(a.account.ID, dep, top)
	forged := top
	forged.References = nil // the same path and bytes, without the edge
	a.worker().do(t, &nixproto.AddMultipleToStore{}, burst(forged))
	if info, err := a.store.Info(t.Context(), a.account.ID, top.Path); err != nil || !slices.Equal(info.References, top.References) {
		t.Errorf("alice's path refers to %v, %v", info, err)
	}
	a.gotNothing(t, dep)
	// A circle, and what is not there.
	x, y := builtPath(t, "x", "x"), builtPath(t, "y", "y")
	x.References, y.References = []nixproto.StorePath{y.Path}, []nixproto.StorePath{x.Path}
	for _, lie := range [][]testPath{{x, y}, {y}} {
		if msg := a.worker().refused(t, &nixproto.AddMultipleToStore{}, burst(lie...)); !strings.Contains(msg, "is not valid") {
			t.Errorf("%q", msg)
		}
	}
	// A content address of other content.
	text := textPath(t, "t", "alice's")
	lie := testPath{text.PathInfo, narOf(t, "mallory")}
	lie.NarHash, lie.NarSize = nixproto.SumSHA256(lie.nar), uint64(len(lie.nar))
	if resp, err := a.worker().Do(&nixproto.AddMultipleToStore{}, burst(lie)); err == nil {
		t.Errorf("forged content address: %+v", resp)
	}
}

// Signatures cost those who look for the path, so that there are a few only.
func TestAttackManySignatures(t *testing.T) {
	a := newAttack(t, nil)
	p := builtPath(t, "p", "x")
	for i := range 2 * store.MaxSignatures {
		p.Signatures = append(p.Signatures, testSigningKey(t, "public-1").Sign(fmt.Sprint(i)))
	}
	if msg := a.worker().refused(t, &nixproto.AddMultipleToStore{}, burst(p)); !strings.Contains(msg, "signatures") {
		t.Errorf("%q", msg)
	}
	p.Signatures = p.Signatures[:store.MaxSignatures]
	a.worker().do(t, &nixproto.AddMultipleToStore{}, burst(p))
	more := []string{testSigningKey(t, "one-more-1").Sign("")}
	if msg := a.worker().refused(t, &nixproto.AddSignatures{Path: p.Path, Signatures: more}, nil); !strings.Contains(msg, "signatures") {
		t.Errorf("%q", msg)
	}
	// Those it has already may come again.
	a.worker().do(t, &nixproto.AddSignatures{Path: p.Path, Signatures: p.Signatures[:1]}, nil)
}
