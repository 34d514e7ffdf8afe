package server

import (
	"context"
	"strings"
	"time"

	"nbd/nixproto"
	"nbd/reuse"
	"nbd/store"
)

// Each request for a build has a record. That of one that waits is a request's
// (request.go); the rest is here: a graph of which all outputs are valid when it
// is planned, and what is refused before there is anything to wait for.

// noteRefused stores that a request was refused, and returns the refusal.
func (b *Builds) noteRefused(ctx context.Context, s *Session, path nixproto.StorePath, drv *nixproto.Derivation, sent Limits, result *nixproto.BuildResult) *nixproto.BuildResult {
	b.noteAnswer(ctx, s, path, drv, sent, result, "request")
	return result
}

// noteAnswer stores how a request was answered, and by which check. Drv is nil
// if it could not be read.
func (b *Builds) noteAnswer(ctx context.Context, s *Session, path nixproto.StorePath, drv *nixproto.Derivation, sent Limits, result *nixproto.BuildResult, check string) {
	const most = 1000 // of what a client wrote
	now := time.Now()
	rec := &store.Build{Account: s.account(), DrvPath: path, Name: strings.TrimSuffix(path.Name(), ".drv"),
		Status: string(reuse.Built), Created: now, Stopped: now, Tags: s.Settings.Tags, Reused: true}
	reason := map[string]string{"cache": "a cache of the account has the outputs"}[check]
	if reason == "" {
		reason = "all outputs are valid already"
	}
	if !result.Status.Success() {
		rec.Status, rec.Error = string(reuse.ClientError), firstLine(result.Error)
		rec.Error = rec.Error[:min(len(rec.Error), most)]
		reason = rec.Error
	}
	rec.Decisions = []store.Decision{{Check: check, Taken: true, Reason: reason}}
	if drv != nil {
		rec.System = clip(printable(drv.System))
		if e, err := s.settingsFor(drv, sent); err == nil { // else that is why it is refused
			rec.Tags = e.Tags
		}
	}
	var err error
	if rec.ID, err = b.store.ReserveBuild(ctx); err == nil {
		err = b.store.WriteBuild(ctx, rec)
	}
	if err != nil {
		b.cfg.Logger.Error("cannot store the record of a request", "drv", path, "err", err)
	}
}

// noteAnswer stores how the request for a derivation was answered, if nothing
// was built for it: what is built has a record already.
func (g *graph) noteAnswer(ctx context.Context, n *node, result *nixproto.BuildResult) {
	if n.asked {
		return
	}
	n.asked = true // once, whatever number of outputs are asked for
	check := "outputs"
	switch {
	case !result.Status.Success():
		check = "request"
	case n.fetched(g.offered):
		check = "cache"
	}
	g.b.noteAnswer(ctx, g.s, n.path, n.drv, g.sent, result, check)
}

// fetched reports whether one of the outputs came from a cache.
func (n *node) fetched(offered map[nixproto.StorePath]bool) bool {
	for _, p := range n.paths {
		if offered[p] {
			return true
		}
	}
	return false
}
