package main

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

func terminal() {
	// Terminals outside are numbered as they come.
	for line := range strings.SplitSeq(text("/build/fds"), "\n") {
		number, what, _ := strings.Cut(line, " ")
		put("descriptor "+number, "%s", strings.TrimRight(what, "0123456789"))
	}
	for fd := range 3 {
		key := fmt.Sprintf("descriptor %d ", fd)
		var st unix.Stat_t
		err := unix.Fstat(fd, &st)
		put(key+"stat", "mode %o owner %d:%d major %d %s", st.Mode, st.Uid, st.Gid, unix.Major(st.Rdev), outcome(err))
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		put(key+"flags", "%#x %s", flags, outcome(err))
		flags, err = unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		put(key+"descriptor flags", "%#x %s", flags, outcome(err))
		t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		if err != nil {
			try(key+"terminal", err)
			continue
		}
		put(key+"terminal", "i %#o o %#o c %#o l %#o line %d cc %v", t.Iflag, t.Oflag, t.Cflag, t.Lflag, t.Line, t.Cc)
		size, err := unix.IoctlGetWinsize(fd, unix.TIOCGWINSZ)
		put(key+"window", "%+v %s", size, outcome(err))
		_, err = unix.IoctlGetInt(fd, unix.TIOCGPGRP)
		try(key+"foreground group", err)
		_, err = unix.IoctlGetInt(fd, unix.TIOCGSID)
		try(key+"session", err)
		to, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
		put(key+"name", "%s %s", strings.TrimRight(to, "0123456789"), outcome(err))
		_, err = os.Stat(to)
		try(key+"by name", err)
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLOUT}}
		_, err = unix.Poll(poll, 0)
		put(key+"poll", "%#x %s", poll[0].Revents, outcome(err))
	}
	n, err := os.Stdin.Read(make([]byte, 1))
	put("read standard input", "%d %s", n, outcome(err))
	_, err = os.OpenFile("/dev/tty", os.O_RDWR, 0)
	try("open controlling terminal", err)

	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	try("new terminal", err)
	if err != nil {
		return
	}
	defer master.Close()
	fd := int(master.Fd())
	try("new terminal unlock", unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0))
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	put("new terminal number", "%d %s", number, outcome(err))
	describe(fmt.Sprintf("/dev/pts/%d", number))
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	try("new terminal open", err)
	if err == nil {
		slave.Close()
	}
}
