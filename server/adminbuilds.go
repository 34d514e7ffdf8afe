package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"time"

	"nbd/server/adminapi"
	"nbd/store"
)

// buildOperator is what an operator can do about builds of all accounts;
// *Builds.
type buildOperator interface {
	BuildControl
	// Queue returns the builds that wait, QueueStatus how much runs and waits.
	Queue() []QueuedBuild
	QueueStatus() QueueStatus
	// Revoke forgets the result under a key, or under the key of a build.
	Revoke(ctx context.Context, what string) (key string, n int, err error)
	// CancelAll ends all builds of an account that wait or run.
	CancelAll(a store.AccountID, by string)
}

// routeBuilds adds what is asked about builds.
func (a *Admin) routeBuilds(mux *http.ServeMux) {
	mux.Handle("GET /builds", a.handle(a.listBuilds))
	mux.Handle("GET /builds/{id}", a.handle(a.showBuild))
	mux.HandleFunc("GET /builds/{id}/log", a.buildLog)
	mux.Handle("POST /builds/{id}/cancel", a.handle(a.cancelBuild))
	mux.Handle("GET /queue", a.handle(a.queue))
	mux.Handle("POST /results/revoke", a.handle(a.revokeResult))
}

// A buildOfAccount is a build as its account sees it, and whose it is.
type buildOfAccount struct {
	Account string `json:"account"`
	apiBuild
	Decisions []store.Decision `json:"decisions,omitempty"`
}

// Bounds of what is listed.
const (
	adminBuilds    = 50
	maxAdminBuilds = 10000
)

func (a *Admin) listBuilds(r *http.Request) (any, error) {
	ctx, q := r.Context(), r.URL.Query()
	tags, err := parseTags(q["tags"])
	if err != nil {
		return nil, &adminapi.Error{Text: err.Error()}
	}
	limit, err := strconv.Atoi(cmp.Or(q.Get("limit"), "0"))
	if err != nil || limit < 0 || limit > maxAdminBuilds {
		return nil, &adminapi.Error{Text: fmt.Sprintf("at most %d builds are listed at once", maxAdminBuilds)}
	}
	f := store.BuildFilter{Status: q["status"], Reused: q.Get("reused") == "true",
		Refused: slices.Contains(q["status"], store.StatusClientError), Limit: cmp.Or(limit, adminBuilds),
		Match: func(b *store.Build) bool { return hasTags(b, tags) }}
	for _, s := range f.Status {
		if !slices.Contains(buildStatuses, s) {
			return nil, &adminapi.Error{Text: fmt.Sprintf("there is no status %q", clip(s)), Hint: fmt.Sprintf("there are %v", buildStatuses)}
		}
	}
	accounts, err := a.accountsNamed(ctx, q.Get("account"))
	if err != nil {
		return nil, err
	}
	list := []buildOfAccount{}
	for _, acc := range accounts {
		builds, err := a.store.Builds(ctx, acc, f)
		if err != nil {
			return nil, err
		}
		name := ""
		for i := range builds {
			if name == "" {
				if name, err = a.accountName(ctx, acc); err != nil {
					return nil, err
				}
			}
			b, err := a.describe(ctx, name, &builds[i])
			if err != nil {
				return nil, err
			}
			list = append(list, b)
		}
	}
	slices.SortFunc(list, func(a, b buildOfAccount) int { return cmp.Compare(b.BuildID, a.BuildID) })
	return list[:min(len(list), f.Limit)], nil
}

// accountsNamed is the account of a name; if name is "", all that have builds,
// those that were removed among them.
func (a *Admin) accountsNamed(ctx context.Context, name string) ([]store.AccountID, error) {
	if name == "" {
		return a.store.BuildAccounts(ctx)
	}
	acc, err := a.account(ctx, name)
	return []store.AccountID{acc.ID}, err
}

func (a *Admin) describe(ctx context.Context, account string, b *store.Build) (buildOfAccount, error) {
	o, err := newAPIBuild(ctx, a.store, b, time.Now())
	return buildOfAccount{Account: account, apiBuild: o}, err
}

// buildNamed is the build of a request's path.
func (a *Admin) buildNamed(r *http.Request) (*store.Build, error) {
	text := r.PathValue("id")
	id, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return nil, &adminapi.Error{Text: fmt.Sprintf("%q is not the id of a build, which is a number", clip(text))}
	}
	b, err := a.store.Build(r.Context(), store.BuildID(id))
	if errors.Is(err, store.ErrNotFound) {
		return nil, &adminapi.Error{Text: fmt.Sprintf("there is no build %d", id), Hint: "see `nbd admin build list`"}
	}
	return b, err
}

// accountName is the name of an account, which may have been removed.
func (a *Admin) accountName(ctx context.Context, id store.AccountID) (string, error) {
	acc, err := a.store.AccountByID(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		return fmt.Sprintf("(removed account %d)", id), nil
	}
	return acc.Name, err
}

func (a *Admin) showBuild(r *http.Request) (any, error) {
	b, err := a.buildNamed(r)
	if err != nil {
		return nil, err
	}
	name, err := a.accountName(r.Context(), b.Account)
	if err != nil {
		return nil, err
	}
	o, err := a.describe(r.Context(), name, b)
	o.Decisions = b.Decisions
	return o, err
}

// buildLog answers with the bytes of a log, as they come.
func (a *Admin) buildLog(w http.ResponseWriter, r *http.Request) {
	log, err := a.openLog(r)
	if err != nil {
		a.handle(func(*http.Request) (any, error) { return nil, err }).ServeHTTP(w, r)
		return
	}
	defer log.Close()
	w.Header().Set("Content-Type", "application/octet-stream")
	if _, err := io.Copy(&flushed{w, http.NewResponseController(w)}, log); err != nil {
		a.log.Debug("nbd admin client is gone", "err", err)
	}
}

func (a *Admin) openLog(r *http.Request) (io.ReadCloser, error) {
	b, err := a.buildNamed(r)
	if err != nil {
		return nil, err
	}
	log, err := openLog(r.Context(), a.store, a.builds, b)
	if errors.Is(err, store.ErrNotFound) {
		return nil, &adminapi.Error{Text: fmt.Sprintf("build %d has no log", b.ID)}
	}
	return log, err
}

// A flushed writer sends what it is given at once.
type flushed struct {
	w io.Writer
	c *http.ResponseController
}

// Write implements io.Writer.
func (f *flushed) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	if err == nil {
		err = f.c.Flush()
	}
	return n, err
}

func (a *Admin) cancelBuild(r *http.Request) (any, error) {
	b, err := a.buildNamed(r)
	if err != nil {
		return nil, err
	}
	err = a.builds.Cancel(r.Context(), b.Account, b.ID, "the operator")
	if errors.Is(err, store.ErrInvalid) {
		return nil, &adminapi.Error{Text: err.Error()}
	}
	return apiAct{Act: "cancelled", BuildID: b.ID}, err
}

func (a *Admin) queue(r *http.Request) (any, error) {
	state := adminapi.QueueState{Queue: adminQueue(a.builds.QueueStatus()), Builds: []adminapi.QueuedBuild{}}
	for _, b := range a.builds.Queue() {
		name, err := a.accountName(r.Context(), b.Account)
		if err != nil {
			return nil, err
		}
		state.Builds = append(state.Builds, adminapi.QueuedBuild{ID: uint64(b.Build), Account: name, Since: b.Since, Ahead: b.Ahead, Lacks: b.Lacks})
	}
	return state, nil
}

func (a *Admin) revokeResult(r *http.Request) (any, error) {
	what := r.URL.Query().Get("what")
	key, n, err := a.builds.Revoke(r.Context(), what)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return nil, &adminapi.Error{Text: fmt.Sprintf("there is no build %q", clip(what)), Hint: "name a build, or a reuse key"}
	case errors.Is(err, store.ErrInvalid):
		return nil, &adminapi.Error{Text: err.Error(), Hint: "name a build, or a reuse key"}
	}
	return adminapi.Revoked{Key: key, Records: n}, err
}
