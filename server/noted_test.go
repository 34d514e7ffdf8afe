package server

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http/httptest"
	"strings"
	"testing"

	"nbd/nixproto"
	"nbd/store"
)

// TestEveryRequestHasARecord: also one that never waited for anything.
func TestEveryRequestHasARecord(t *testing.T) {
	bt := newBuildTest(t, nil)
	env := map[string]string{"NBD_TAG_CASE": "x"}
	bt.session = bt.newSessionWith(bt.account, env)
	chain := bt.chain("c", 2)
	bt.paths(nixproto.BuildNormal, all(chain[1]))
	if n := len(bt.requests()); n != 2 {
		t.Fatalf("%d requests after a graph of 2 builds", n)
	}
	last := func(want int) store.Build {
		t.Helper()
		list := bt.requests()
		if len(list) != want {
			t.Fatalf("%d requests, want %d: %+v", len(list), want, list)
		}
		b := list[len(list)-1]
		if !b.Reused || b.Stopped.IsZero() || b.Account != bt.account.ID || len(b.Decisions) != 1 || !b.Decisions[0].Taken {
			t.Errorf("record %+v", b)
		}
		return b
	}

	// All is valid: one request, whatever is named of it; its dependency is none.
	bt.paths(nixproto.BuildNormal, all(chain[1]), outputs(chain[1], "out"), nixproto.DerivedPath{Path: chain[1]})
	b := last(3)
	if b.Status != store.StatusBuilt || b.DrvPath != chain[1] || b.Name != "c-1" || b.System != "x86_64-linux" || b.Tags["CASE"] != "x" || b.Decisions[0].Check != "outputs" {
		t.Errorf("valid: %+v", b)
	}
	// Refused when it is planned, and by the look of it.
	gone := nixproto.StorePath("/nix/store/00000000000000000000000000000000-gone.drv")
	bt.paths(nixproto.BuildNormal, all(gone))
	if b := last(4); b.Status != store.StatusClientError || b.Name != "gone" || !strings.Contains(b.Error, "is not valid") || b.Tags["CASE"] != "x" || b.Decisions[0].Reason != b.Error {
		t.Errorf("not there: %+v", b)
	}
	bt.paths(nixproto.BuildNormal, outputs(chain[1], "nope"))
	if b := last(5); b.Status != store.StatusClientError || !strings.Contains(b.Error, "no output 'nope'") {
		t.Errorf("no such output: %+v", b)
	}
	other := drv("other")
	other.System = strings.Repeat("z", 5000)
	bt.build(bt.request(other))
	if b := last(6); b.Status != store.StatusClientError || b.Name != "other" || len(b.System) > 100 || len(b.Error) > 1000 {
		t.Errorf("another system: %+v", b)
	}
	// A dependency that fails.
	bt.runner.act("bad", func(*fakeRun) error { return exit(1) })
	bad := bt.addDrv(drv("bad"))
	top := drv("top")
	bt.dependsOn(top, bad, "out")
	bt.paths(nixproto.BuildNormal, all(bt.addDrv(top)))
	if b := last(8); b.Status != store.StatusClientError || b.Name != "top" || !strings.Contains(b.Error, "1 dependency failed") {
		t.Errorf("a dependency failed: %+v", b)
	}

	// Plain lists have what ran; refusals are found by their status.
	if n := len(bt.records()); n != 3 {
		t.Errorf("%d runs, want 3", n)
	}
	list, err := bt.st.Builds(t.Context(), bt.account.ID, store.BuildFilter{Status: []string{store.StatusClientError}, Refused: true})
	if err != nil || len(list) != 4 {
		t.Errorf("refused: %d, %v", len(list), err)
	}
	u, err := bt.st.Usage(t.Context(), bt.account.ID, list[0].Created)
	if err != nil || u.Builds != 3 || u.Reused != 1 {
		t.Errorf("usage %+v, %v", u, err)
	}
}

// TestListOfRefused: who looks for why nothing was built finds it, and counts of
// what ran stay what they are.
func TestListOfRefused(t *testing.T) {
	ts, _, _ := newBuildServer(t)
	ts.api(ts.alice, "settings max-cpu-hours-per-month --set 0", new(any))
	if r := <-ts.startBuild(t, "limited"); r == nil || r.Status.Success() || !strings.Contains(r.Error, "max-cpu-hours-per-month") {
		t.Fatalf("%+v", r)
	}
	ts.until(t, "", 0)
	b := ts.until(t, "--status client_error", 1)[0]
	if !strings.Contains(b.StatusMessage, "max-cpu-hours-per-month") || b.CPUSeconds != 0 || b.StartTime != nil {
		t.Errorf("%+v", b)
	}
	ts.until(t, "--reused", 1)
	ts.until(t, "--status built,client_error", 1)
	var s apiSummary
	ts.api(ts.alice, "builds summary", &s)
	if s.BuildCount != 0 {
		t.Errorf("summary %+v", s)
	}
	if out, _, _ := ts.command(ts.alice, "shell help builds list", ""); !strings.Contains(out, "--status client_error those that were refused") {
		t.Errorf("help: %s", out)
	}
}

// adminBuildList is what the operator is told.
func adminBuildList(t *testing.T, ts *testServer, builds *Builds, path string) (list []buildOfAccount) {
	t.Helper()
	admin := NewAdmin(ts.store, ts.book, nil, ts.Disconnect, slog.New(slog.DiscardHandler))
	admin.builds = builds
	w := httptest.NewRecorder()
	admin.http.Handler.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
	if err := json.Unmarshal(w.Body.Bytes(), &list); err != nil {
		t.Fatalf("%v in %s", err, w.Body)
	}
	return list
}

// TestAdminBuildsOfRemovedAccounts: the operator sees them for as long as there
// are records.
func TestAdminBuildsOfRemovedAccounts(t *testing.T) {
	ts, _, builds := newBuildServer(t)
	bob := ts.addAccount("bob", newKey(t), nil)
	ts.addBuild(bob.ID, nil)
	if err := ts.store.RemoveAccount(context.Background(), bob.ID); err != nil {
		t.Fatal(err)
	}
	list := adminBuildList(t, ts, builds, "/builds")
	if len(list) != 1 || list[0].Account != "(removed account 2)" {
		t.Errorf("%+v", list)
	}
	if list := adminBuildList(t, ts, builds, "/builds?account=alice"); len(list) != 0 {
		t.Errorf("alice's: %+v", list)
	}
}
