package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"

	"nbd/nixproto"
	"nbd/reuse"
	"nbd/store"
)

// A recipe is what makes a build again: all of a job that does not come from
// the account. It is stored under the reuse key, as JSON, by the first account
// that has such a build, for all of them: it holds nothing that does not follow
// from the key.
type recipe struct {
	Name           string             `json:"name"`
	ATerm          []byte             `json:"aterm"` // resolved
	ScratchDrv     nixproto.StorePath `json:"scratchDrv,omitempty"`
	BeforeSelfHash bool               `json:"beforeSelfHash,omitempty"`
}

func (b *Builds) writeRecipe(a *attempt) error {
	j := a.job
	text, err := json.Marshal(recipe{j.drv.Name, j.drv.ATerm(), j.scratchDrv, j.beforeSelfHash})
	if err != nil {
		return err
	}
	return b.store.WriteRecipe(context.Background(), a.key, text)
}

// Restart makes a build of the session's account again that has ended, in the
// background and for the account, and returns the id of the new one. Stored
// failures and timeouts do not answer it. A build that is not the account's is
// store.ErrNotFound, one that cannot be started again store.ErrInvalid.
func (b *Builds) Restart(ctx context.Context, s *Session, id store.BuildID) (store.BuildID, error) {
	rec, err := b.ownRecord(ctx, s.account(), id)
	if err != nil {
		return 0, err
	}
	if !reuse.Status(rec.Status).Ended() {
		return 0, fmt.Errorf("restart build %d: %w: it has not ended", id, store.ErrInvalid)
	}
	j, err := b.jobAgain(ctx, s, rec)
	if err != nil {
		return 0, fmt.Errorf("restart build %d: %w", id, err)
	}
	own := *s
	lease := s.Sight.NewLease()
	own.leases = lease
	newID := make(chan store.BuildID, 1)
	failed := make(chan error, 1)
	err = b.keep(j, func(ctx context.Context) {
		defer lease.Release()
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		r, err := b.newRequest(ctx, &own, j, cancel)
		if err != nil {
			failed <- err
			return
		}
		newID <- r.id()
		if _, err := b.serveRequest(ctx, r, nowhere{}); err != nil {
			b.cfg.Logger.Error("build that was started again", "build", r.id(), "err", err)
		}
	})
	if err != nil {
		lease.Release()
		return 0, err
	}
	select {
	case err := <-failed:
		return 0, err
	case next := <-newID:
		rec.RestartedAs = next
		return next, b.store.WriteBuild(ctx, rec)
	}
}

// jobAgain is the job of a build that is made again.
func (b *Builds) jobAgain(ctx context.Context, s *Session, rec *store.Build) (*job, error) {
	key, err := reuse.ParseKey(rec.Key)
	if err != nil {
		return nil, fmt.Errorf("%w: it was no build that can be made again", store.ErrInvalid)
	}
	text, err := b.store.Recipe(ctx, key)
	if errors.Is(err, store.ErrNotFound) {
		return nil, fmt.Errorf("%w: its derivation is not stored", store.ErrInvalid)
	} else if err != nil {
		return nil, err
	}
	var r recipe
	if err := json.Unmarshal(text, &r); err != nil {
		return nil, fmt.Errorf("its recipe: %w: %w", store.ErrDamaged, err)
	}
	drv, err := nixproto.ParseDerivation(r.Name, r.ATerm)
	if err != nil {
		return nil, fmt.Errorf("its derivation: %w: %w", store.ErrDamaged, err)
	}
	set, err := b.policy(s, drv, Limits{})
	if err != nil {
		return nil, err
	}
	// Which derivations resolve to this one is each account's to know.
	hash, err := nixproto.NewModulo(nil).RealisationHash(drv)
	if err != nil {
		return nil, fmt.Errorf("its derivation: %w: %w", store.ErrDamaged, err)
	}
	return &job{account: s.account(), drvPath: rec.DrvPath, drv: drv, set: set, hash: hash,
		scratchDrv: r.ScratchDrv, beforeSelfHash: r.BeforeSelfHash, restart: rec}, nil
}

// Revoke forgets what is stored under a reuse key, so that the next request
// runs; what names the key itself or a build that has it. It returns the key,
// and how many records there were. Views keep what they have.
func (b *Builds) Revoke(ctx context.Context, what string) (key string, n int, err error) {
	k, err := reuse.ParseKey(what)
	if err != nil {
		id, numErr := strconv.ParseUint(what, 10, 64)
		if numErr != nil {
			return "", 0, fmt.Errorf("revoke result: %w: %q is neither a build nor a key", store.ErrInvalid, clip(what))
		}
		rec, err := b.store.Build(ctx, store.BuildID(id))
		if err != nil {
			return "", 0, err
		}
		if k, err = reuse.ParseKey(rec.Key); err != nil {
			return "", 0, fmt.Errorf("revoke result: %w: build %d has no key", store.ErrInvalid, id)
		}
	}
	n, err = b.store.RevokeEnds(ctx, k)
	return k.String(), n, err
}

// nowhere is a LogSink that shows nothing.
type nowhere struct{}

func (nowhere) StartBuild(nixproto.StorePath) BuildLog             { return nowhere{} }
func (nowhere) StartWait(nixproto.StorePath, string) (stop func()) { return func() {} }
func (nowhere) StartCopy(nixproto.StorePath, string) (stop func()) { return func() {} }
func (nowhere) Progress(_, _, _, _ uint64)                         {}
func (nowhere) Note(string)                                        {}
func (nowhere) Write(p []byte) (int, error)                        { return len(p), nil }
func (nowhere) Stop()                                              {}
