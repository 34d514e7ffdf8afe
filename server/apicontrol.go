package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"nbd/reuse"
	"nbd/store"
)

// A BuildControl acts on builds that wait, run or have ended; *Builds. A build
// that is not the account's is store.ErrNotFound, one with which that cannot be
// done store.ErrInvalid. Methods are safe for concurrent use.
type BuildControl interface {
	// Cancel ends a build that waits or runs; by says who did.
	Cancel(ctx context.Context, a store.AccountID, id store.BuildID, by string) error
	// Restart makes a build that ended again, in the background, and returns the
	// id of the new one.
	Restart(ctx context.Context, s *Session, id store.BuildID) (store.BuildID, error)
	// Follow returns the log from its beginning, and what comes until the build
	// ends; its record tells how by then. The caller closes it.
	Follow(ctx context.Context, a store.AccountID, id store.BuildID) (io.ReadCloser, error)
}

// controlCommands act on builds.
func controlCommands() []apiCommand {
	return []apiCommand{
		{name: "builds log", args: "ID", need: BuildRead, run: buildLog,
			help: "print the log of a build, live while it runs", complete: completeBuild,
			more: "On a pipe, and with api, the bytes are those that the builder wrote."},
		{name: "builds cancel", args: "ID", need: BuildWrite, run: cancelBuild, text: textOf(printAct), complete: completeLive,
			help: "end a build that waits or runs",
			more: "Others that wait for the same run are not disturbed."},
		{name: "builds restart", args: "ID", need: BuildWrite, run: restartBuild, text: textOf(printAct), complete: completeBuild,
			help: "make a build that ended again, in the background"},
		{name: "builds attach", args: "ID", need: BuildRead, run: attachBuild, complete: completeLive,
			help: "follow a build until it ends, and show how",
			more: "With api its log is not shown, and the answer is the build when it has ended.",
			text: textOf(func(w io.Writer, b apiBuild) error {
				_, err := fmt.Fprintf(w, "build %d: %s\n", b.BuildID, b.Status)
				return err
			})},
	}
}

// errNoControl is for servers that only look at builds.
var errNoControl = refusef("builds cannot be changed or followed on this server")

// control returns who acts on builds, and the id that the first argument is.
func (c *apiCall) control() (BuildControl, store.BuildID, error) {
	id, err := c.buildID()
	if err == nil && c.server.cfg.Control == nil {
		err = errNoControl
	}
	return c.server.cfg.Control, id, err
}

// buildID reads the first argument.
func (c *apiCall) buildID() (store.BuildID, error) {
	id, err := strconv.ParseUint(c.args[0], 10, 64)
	if err != nil {
		return 0, usagef("%q is not the id of a build, which is a number", clip(c.args[0]))
	}
	return store.BuildID(id), nil
}

// An apiAct is what was done to a build.
type apiAct struct {
	Act       string         `json:"act"` // "cancelled", "restarted"
	BuildID   store.BuildID  `json:"build_id"`
	RestartOf *store.BuildID `json:"restart_of_build_id,omitempty"`
}

func printAct(w io.Writer, a apiAct) error {
	text := fmt.Sprintf("build %d is %s\n", a.BuildID, a.Act)
	if a.RestartOf != nil {
		text = fmt.Sprintf("build %d is made again as build %d\n", *a.RestartOf, a.BuildID)
	}
	_, err := io.WriteString(w, text)
	return err
}

func cancelBuild(ctx context.Context, c *apiCall) (any, error) {
	control, id, err := c.control()
	if err != nil {
		return nil, err
	}
	if err := control.Cancel(ctx, c.account(), id, c.Client.who()); err != nil {
		return nil, explainBuild(err, id)
	}
	c.Log.Info("build cancelled", "build", id, "by", c.Client.who())
	return apiAct{Act: "cancelled", BuildID: id}, nil
}

func restartBuild(ctx context.Context, c *apiCall) (any, error) {
	control, id, err := c.control()
	if err != nil {
		return nil, err
	}
	next, err := control.Restart(ctx, c.Session, id)
	if err != nil {
		return nil, explainBuild(err, id)
	}
	return apiAct{Act: "restarted", BuildID: next, RestartOf: &id}, nil
}

// explainBuild names the build that is not there.
func explainBuild(err error, id store.BuildID) error {
	if errors.Is(err, store.ErrNotFound) {
		return noBuild(id)
	}
	return err
}

// buildLog answers with the log of a build: that of the run that answered it, if
// it was no run itself.
func buildLog(ctx context.Context, c *apiCall) (any, error) {
	id, err := c.buildID()
	if err != nil {
		return nil, err
	}
	control := c.server.cfg.Control
	b, err := ownBuild(ctx, c.server.store, c.account(), id)
	var log io.ReadCloser
	switch {
	case err == nil:
		if log, err = openLog(ctx, c.server.store, control, b); errors.Is(err, store.ErrNotFound) {
			return nil, notFoundf("build %d has no log", id)
		}
	case errors.Is(err, store.ErrNotFound) && control != nil: // it may wait, and not be stored yet
		log, err = control.Follow(ctx, c.account(), id)
	}
	if errors.Is(err, store.ErrNotFound) {
		return nil, noBuild(id)
	}
	return log, err
}

// openLog opens the log of a build, as control follows it while the build has
// not ended. One that has none is store.ErrNotFound.
func openLog(ctx context.Context, st *store.Store, control BuildControl, b *store.Build) (io.ReadCloser, error) {
	if control != nil && !reuse.Status(b.Status).Ended() {
		log, err := control.Follow(ctx, b.Account, b.ID)
		if !errors.Is(err, store.ErrNotFound) {
			return log, err
		}
	}
	return st.OpenBuildLog(ctx, logOf(b))
}

// logOf is the build whose log is that of b.
func logOf(b *store.Build) store.BuildID {
	if b.LogOf != 0 {
		return b.LogOf
	}
	return b.ID
}

// An attached is a build that is followed: its log, and then how it ended.
type attached struct {
	log io.ReadCloser
	end func() (apiBuild, error)
}

func attachBuild(ctx context.Context, c *apiCall) (any, error) {
	v, err := buildLog(ctx, c)
	var missing *notFoundError
	if errors.As(err, &missing) { // it may have ended without a log
		return showBuild(ctx, c)
	} else if err != nil {
		return nil, err
	}
	return &attached{v.(io.ReadCloser), func() (apiBuild, error) { return c.endedBuild(ctx) }}, nil
}

// endedBuild returns a build whose log has ended.
func (c *apiCall) endedBuild(ctx context.Context) (apiBuild, error) {
	b, err := c.build(ctx)
	if err != nil {
		return apiBuild{}, err
	}
	return newAPIBuild(ctx, c.server.store, b, time.Now())
}

// completeLive completes the id of a build that has not ended.
func completeLive(ctx context.Context, c *apiCall, args []string) []string {
	return completeBuilds(ctx, c, args, store.BuildFilter{Status: []string{store.StatusPending, store.StatusRunning}, Reused: true, Limit: shellBuilds})
}
